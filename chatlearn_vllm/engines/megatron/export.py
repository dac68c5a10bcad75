"""How does a training checkpoint become a directory that transformers, vLLM or PEFT load?

In one process on the CPU, without megatron-core or a process group: a checkpoint's tensors are read
piece by piece and placed by the layout of a model on a single rank, whatever sizes wrote them.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from chatlearn_vllm.config import ModelArgs
from chatlearn_vllm.engines.megatron import checkpoint_files
from chatlearn_vllm.engines.megatron.files import read_json
from chatlearn_vllm.engines.megatron.hf_checkpoint import MAX_FILE_BYTES, LaidOut, save_hf
from chatlearn_vllm.engines.megatron.padding import pad_token_id
from chatlearn_vllm.engines.megatron.peft_checkpoint import save_peft
from chatlearn_vllm.layouts import MegatronShards, ModelShape, ParamLayout, TrainParallel
from chatlearn_vllm.weight_sync.lora import merged

_EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_SAVED_AS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Parameters that megatron-core's local layers save under the names of Transformer Engine's."""

logger = logging.getLogger(__name__)


class Adapters(NamedTuple):
    """LoRA adapters of a checkpoint."""

    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """(A [r, in], B [out, r]) by the name of the weight."""
    args: ModelArgs
    """lora_r, lora_alpha, and `load`: where the base model was."""

    @property
    def scale(self) -> float:
        """Factor on B @ A."""
        return self.args.lora_alpha / self.args.lora_r


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    adapter_only: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write the model of a training checkpoint in Hugging Face form.

    A scalar head makes it a *ForSequenceClassification model. Adapters are merged into the weights.
    About one file of weights is in memory at a time.

    Args:
        checkpoint: an iteration's directory, or the one above it: then its newest complete one.
        out: made, whole or not at all; if it is there, it must be empty.
        dtype: of the weights written; None for that of training, which config.json says.
        adapter_only: write the adapters by themselves, for the PEFT library and vLLM's LoRA.
        max_file_bytes: a file is closed when it has reached this size.

    Returns:
        The iteration's directory that was read.

    Raises:
        ValueError: `out` is not empty; there is no complete checkpoint; its files are not as they
            were written; it is not of the model that its config.json describes.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there and not empty; remove it or name another directory")
    path = find_checkpoint(checkpoint)
    about = checkpoint_files.check(path)
    if "format_version" not in about:
        raise ValueError(
            f"{path}: was written by a version that saved no config.json beside the weights; "
            "resume from it and save once with this version, or call save_hf"
        )
    hf_files = path / checkpoint_files.HF_FILES
    config = read_json(hf_files / "config.json")
    if about["head"] == "scalar":  # earlier versions took an end-of-sequence token
        config["pad_token_id"] = pad_token_id(config, [hf_files])
    dtype = dtype or getattr(torch, config.get("dtype") or config["torch_dtype"])
    shape = ModelShape.from_hf_config(config, about["head"])
    tensors = SavedTensors(path)
    layouts = _layouts(shape, tensors)
    adapters = _read_adapters(about, layouts, tensors)
    # Values are read when their turn comes: these only say what they will be.
    parameters = [
        LaidOut(layout, torch.empty(layout.shape, dtype=dtype, device="meta")) for layout in layouts
    ]
    if adapter_only:
        if adapters is None:
            raise ValueError(f"{path}: has no adapters (lora_r is 0); export it without --adapter")
        matrices = {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in adapters.matrices.items()}
        save_peft(out, parameters, matrices, shape, adapters.args)
        return path

    def value_of(parameter: LaidOut) -> torch.Tensor:
        name = parameter.layout.name
        value = tensors.read(name)
        if adapters is None or name not in adapters.matrices:
            return value
        # Rounded once, to the wider type; the narrower one comes when the file is written.
        value = value.to(torch.promote_types(value.dtype, dtype))
        return merged(value, *adapters.matrices[name], adapters.scale)

    save_hf(
        out,
        parameters,
        shape,
        config,
        side_files_from=[hf_files],
        max_file_bytes=max_file_bytes,
        value_of=value_of,
    )
    return path


def find_checkpoint(directory: Path) -> Path:
    """The directory itself if it is that of an iteration, else that of the newest complete one.

    That is the one that was saved last; if its files are broken, the one with the highest number.

    Raises:
        ValueError: there is none.
    """
    if (directory / checkpoint_files.MARKER).is_file():
        return directory
    names = [
        checkpoint_files.checkpoint_name(iteration)
        for iteration in reversed(checkpoint_files.iterations(directory))
    ]
    latest = directory / checkpoint_files.LATEST
    if latest.is_file() and (last := latest.read_text().strip()) in names:
        names.insert(0, last)
    for path in (directory / name for name in names):
        found = checkpoint_files.problems(path)
        if not found:
            return path
        logger.warning("%s is passed over: %s", path, "; ".join(found))
    below = sorted(
        {str(marker.parents[1]) for marker in directory.glob(f"*/iter_*/{checkpoint_files.MARKER}")}
    )
    raise ValueError(
        f"{directory}: no complete checkpoint of a trainer there (iter_*/{checkpoint_files.MARKER})"
        + (f"; there are some in {', '.join(below)}" if below else "")
    )


class SavedTensors:
    """The model's tensors in a checkpoint of dist_checkpointing, by the names of the layouts.

    Layers that are alike are saved as one tensor with an axis for the layers, and experts with one
    for the experts: [layers, experts, ...].
    """

    def __init__(self, path: Path) -> None:
        """Read the list of tensors."""
        self._path = path
        metadata = FileSystemReader(path).read_metadata()
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._storage = metadata.storage_data
        self._chunks_by_place: dict[tuple[str, int], Mapping[tuple[int, ...], list]] = {}

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Full shape of a parameter; None where it was not saved."""
        found = self._find(name)
        return None if found is None else tuple(self._tensors[found[0]].size[len(found[1]) :])

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter, on the CPU, in the type in which it was saved."""
        key, place = self._find(name)
        tensor = self._tensors[key]
        value = torch.empty(tensor.size[len(place) :], dtype=tensor.properties.dtype)
        num_missing = value.numel()
        for chunk in self._chunks(key, len(place))[place]:
            offsets, sizes = chunk.offsets[len(place) :], chunk.sizes[len(place) :]
            part = tuple(
                slice(start, start + size) for start, size in zip(offsets, sizes, strict=True)
            )
            value[part] = self._read_chunk(key, chunk.offsets).view(sizes)
            num_missing -= math.prod(sizes)
        assert num_missing == 0, f"{key}{list(place)}: {num_missing} elements are not in the files"
        return value

    def _find(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """(key, place along its leading axes) of a parameter."""
        layer = _LAYER.fullmatch(name)
        if layer is None:
            return (name, ()) if name in self._tensors else None
        number, rest = int(layer[1]), layer[2]
        place: tuple[int, ...] = ()
        if expert := _EXPERT.fullmatch(rest):
            place, rest = (int(expert[1]),), f"mlp.experts.experts.{expert[2]}"
        for saved in (rest, _SAVED_AS.get(rest, rest)):
            if (key := f"decoder.layers.{saved}") in self._tensors:
                return key, (number, *place)
            if (key := f"decoder.layers.{number}.{saved}") in self._tensors:
                return key, place
        return None

    def _chunks(self, key: str, num_axes: int) -> Mapping[tuple[int, ...], list]:
        """The saved pieces of a tensor, by their place along its first axes."""
        if (key, num_axes) not in self._chunks_by_place:
            chunks = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                chunks[tuple(chunk.offsets[:num_axes])].append(chunk)
            self._chunks_by_place[key, num_axes] = chunks
        return self._chunks_by_place[key, num_axes]

    def _read_chunk(self, key: str, offsets: torch.Size) -> torch.Tensor:
        place = self._storage[MetadataIndex(key, offsets)]
        with (self._path / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _layouts(shape: ModelShape, tensors: SavedTensors) -> list[ParamLayout]:
    """All parameters of the model on one rank.

    Raises:
        ValueError: lists what was not saved, or with another shape.
    """
    embedding = tensors.shape_of(_EMBEDDING)
    padded_vocab_size = embedding[0] if embedding else None
    layouts = MegatronShards(shape, TrainParallel(1), padded_vocab_size).rank_layouts(0)
    wrong = [
        f"{layout.name}: is {tensors.shape_of(layout.name)}, should be {layout.shape}"
        for layout in layouts
        if tensors.shape_of(layout.name) != layout.shape
    ]
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(
            "the checkpoint is not of the model that its config.json describes; a model_provider "
            f"that builds another one has to be exported by its own save_hf:\n  {listed}"
        )
    return layouts


def _read_adapters(
    about: Mapping[str, Any], layouts: list[ParamLayout], tensors: SavedTensors
) -> Adapters | None:
    """All adapters, in the type of training; None where there are none."""
    settings = about["adapters"]
    if not settings["lora_r"]:
        return None
    matrices = {}
    for name in (layout.name for layout in layouts):
        A, B = (f"{name.removesuffix('weight')}lora_{letter}" for letter in "ab")
        if tensors.shape_of(A) is not None:
            matrices[name] = tensors.read(A), tensors.read(B).flatten(0, 1)
    args = ModelArgs(
        load=about["load"], lora_r=settings["lora_r"], lora_alpha=settings["lora_alpha"]
    )
    return Adapters(matrices, args)
