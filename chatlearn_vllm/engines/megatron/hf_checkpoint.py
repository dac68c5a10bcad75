"""How do a rank's parameters come from a Hugging Face checkpoint, and become one again?"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from chatlearn_vllm.engines.megatron.files import atomic_directory, rank, world_size
from chatlearn_vllm.engines.megatron.padding import let_tokenizer_pad_with
from chatlearn_vllm.layouts import SCORE, ModelShape, ParamLayout
from chatlearn_vllm.layouts.blocks import Rect

MAX_FILE_BYTES = 5 * 2**30
"""A saved checkpoint is cut into files of about this size."""

_CLASSIFIER = "ForSequenceClassification"
_INDEX = "model.safetensors.index.json"
_SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)
"""What travels from the source directory into a saved one, besides weights and config.json."""


class LogicalTensors(Protocol):
    """Where the values of logical tensors come from."""

    def read(self, name: str, rect: Rect) -> torch.Tensor:
        """One rectangle of a logical tensor, on the CPU."""


class HFWeights:
    """The safetensors of a directory, read by rectangles: a rank reads only what it holds."""

    def __init__(self, directory: Path) -> None:
        """Find the file of every tensor.

        Raises:
            ValueError: the directory has no safetensors, or its index names a missing file.
        """
        self.directory = directory
        index = directory / _INDEX
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            self._file_of = {}
            for path in sorted(directory.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    self._file_of.update(dict.fromkeys(file.keys(), path.name))
        missing = sorted(
            {name for name in self._file_of.values() if not (directory / name).is_file()}
        )
        if missing or not self._file_of:
            raise ValueError(
                f"{directory}: no complete safetensors checkpoint "
                f"(missing {', '.join(missing) or '*.safetensors'})"
            )
        self._open: dict[str, Any] = {}

    @staticmethod
    def exist_in(directory: Path) -> bool:
        """Whether the directory holds weights in safetensors."""
        return any(directory.glob("*.safetensors"))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def problem_with(self, name: str, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a tensor that should be there with this shape, or None."""
        if name not in self:
            return f"{name}: not in the checkpoint"
        found = tuple(self._slice(name).get_shape())
        # The number of labels is what this side decides, not config.json.
        who = "a head with one label is" if name == SCORE else "config.json says"
        return None if found == shape else f"{name}: is {found}, {who} {shape}"

    def read(self, name: str, rect: Rect) -> torch.Tensor:
        """See LogicalTensors."""
        return self._slice(name)[tuple(slice(*bounds) for bounds in rect)]

    def _slice(self, name: str) -> Any:
        file_name = self._file_of[name]
        if file_name not in self._open:
            self._open[file_name] = safe_open(self.directory / file_name, framework="pt")
        return self._open[file_name].get_slice(name)


class LaidOut(NamedTuple):
    """A local parameter with the place of its elements in the logical tensors."""

    layout: ParamLayout
    data: torch.Tensor


def _data(parameter: LaidOut) -> torch.Tensor:
    return parameter.data


def check_complete(parameters: Iterable[LaidOut], source: HFWeights, model: ModelShape) -> None:
    """Compare a checkpoint with what this rank needs of it.

    Raises:
        ValueError: lists every tensor that is missing or has another shape.
    """
    needed = {block.tensor for layout, _ in parameters for block in layout.blocks}
    problems = [source.problem_with(name, model.tensor_shape(name)) for name in sorted(needed)]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError(f"{source.directory} does not fit:\n  " + "\n  ".join(problems))


@torch.no_grad()
def fill_parameters(parameters: Iterable[LaidOut], source: LogicalTensors) -> None:
    """Copy into every parameter its part of the logical tensors; padding becomes zero."""
    for layout, data in parameters:
        staged = torch.zeros(layout.shape, dtype=data.dtype)
        for block in layout.blocks:
            staged[_slices(block.local)] = source.read(block.tensor, block.logical).to(data.dtype)
        data.copy_(staged)


def save_hf(
    directory: Path,
    parameters: list[LaidOut],
    model: ModelShape,
    hf_config: Mapping[str, Any],
    *,
    side_files_from: Iterable[Path] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    value_of: Callable[[LaidOut], torch.Tensor] = _data,
) -> None:
    """Write a directory that transformers and vLLM load. Collective over all ranks.

    Without a process group the calling process is the only rank.

    Rank 0 gathers the logical tensors over gloo and holds about one file of them at a time.

    Args:
        directory: replaced if it exists, whole or not at all.
        parameters: this rank's, less those that another data parallel copy writes.
        model: sizes of the model.
        hf_config: becomes config.json, with the dtype of the weights.
        side_files_from: directories whose tokenizer files are copied along.
        max_file_bytes: a file is closed when it has reached this size.
        value_of: what to write for a parameter.
    """
    with atomic_directory(directory) as temporary:
        tensors = gather_logical_tensors(parameters, model.tensor_shape, value_of)
        if rank() == 0:
            _write_files(temporary, tensors, max_file_bytes)
            write_side_files(temporary, hf_config, parameters[0].data.dtype, side_files_from)
        else:
            for _ in tensors:  # runs this rank's sends
                pass


def write_side_files(
    directory: Path, hf_config: Mapping[str, Any], dtype: torch.dtype, sources: Iterable[Path]
) -> None:
    """Write what a model in Hugging Face form needs besides weights. Not collective.

    The tokenizer of a *ForSequenceClassification model pads as config.json says: the model finds
    the end of a row by that.

    Args:
        directory: is there.
        hf_config: becomes config.json.
        dtype: of the weights, noted there.
        sources: directories whose tokenizer files are copied, later ones over earlier ones.
    """
    _write_config(directory, hf_config, dtype)
    _copy_side_files(directory, sources)
    if any(name.endswith(_CLASSIFIER) for name in hf_config.get("architectures") or ()):
        let_tokenizer_pad_with(directory, hf_config.get("pad_token_id"))


class _Transfer(NamedTuple):
    """One parameter of one rank and which of its blocks rank 0 takes from it."""

    rank: int
    index: int
    layout: ParamLayout
    dtype: torch.dtype
    block_numbers: tuple[int, ...]


def gather_logical_tensors(
    parameters: list[LaidOut],
    shape_of: Callable[[str], tuple[int, ...]],
    value_of: Callable[[LaidOut], torch.Tensor] = _data,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, full tensor on the CPU) on rank 0, nothing elsewhere.

    Collective over all ranks: each must exhaust the iterator. A rectangle that several ranks hold
    (norms, tied embeddings) is sent by one of them.
    """
    own_rank = rank()
    pending: dict[str, torch.Tensor] = {}
    num_missing: dict[str, int] = {}
    for transfer in _plan_transfers(parameters):
        if own_rank == 0:
            if transfer.rank == 0:
                data = value_of(parameters[transfer.index]).detach().cpu()
            else:
                data = torch.empty(transfer.layout.shape, dtype=transfer.dtype)
                dist.recv(_bytes(data), src=transfer.rank)
            for number in transfer.block_numbers:
                block = transfer.layout.blocks[number]
                name = block.tensor
                if name not in pending:
                    shape = shape_of(name)
                    pending[name] = torch.empty(shape, dtype=transfer.dtype)
                    num_missing[name] = math.prod(shape)
                pending[name][_slices(block.logical)] = data[_slices(block.local)]
                num_missing[name] -= block.num_elements
                if num_missing[name] == 0:
                    yield name, pending.pop(name)
        elif transfer.rank == own_rank:
            dist.send(_bytes(value_of(parameters[transfer.index]).detach().cpu()), dst=0)
    assert not pending, f"no rank holds all of {sorted(pending)}"


def _plan_transfers(parameters: list[LaidOut]) -> list[_Transfer]:
    """Agree on who sends what, ordered by layer so that logical tensors complete early."""
    mine = [(layout, data.dtype) for layout, data in parameters]
    everyone: list[list[tuple[ParamLayout, torch.dtype]]] = [mine] * world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    taken: set[tuple[str, Rect]] = set()
    transfers = []
    for sender, theirs in enumerate(everyone):
        for index, (layout, dtype) in enumerate(theirs):
            numbers = tuple(
                number
                for number, block in enumerate(layout.blocks)
                if (block.tensor, block.logical) not in taken
            )
            if numbers:
                taken.update((block.tensor, block.logical) for block in layout.blocks)
                transfers.append(_Transfer(sender, index, layout, dtype, numbers))
    return sorted(transfers, key=lambda t: (_layer_number(t.layout.name), t.layout.name, t.rank))


def _layer_number(name: str) -> int:
    """Embedding first, then the layers, then the rest."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    if match:
        return int(match[1])
    return -1 if name.startswith("embedding.") else 2**31


def _write_files(
    directory: Path, tensors: Iterator[tuple[str, torch.Tensor]], max_file_bytes: int
) -> None:
    """Write safetensors files of at most about `max_file_bytes`, and their index if several."""
    files: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = 0

    def close_file() -> None:
        save_file(held, directory / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(sorted(held))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        total += tensor.nbytes
        if sum(t.nbytes for t in held.values()) >= max_file_bytes:
            close_file()
    if held:
        close_file()
    weight_map = {}
    for number, names in enumerate(files):
        final = "model.safetensors"
        if len(files) > 1:
            final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (directory / f"part-{number}.safetensors").rename(directory / final)
        weight_map.update(dict.fromkeys(names, final))
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2))


def _write_config(directory: Path, hf_config: Mapping[str, Any], dtype: torch.dtype) -> None:
    # transformers 5 writes "dtype"; all versions read "torch_dtype".
    key = "dtype" if "dtype" in hf_config else "torch_dtype"
    config = {**hf_config, key: str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _copy_side_files(directory: Path, sources: Iterable[Path]) -> None:
    for source in sources:
        for pattern in _SIDE_FILES:
            for path in source.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, directory / path.name)


def _slices(rect: Rect) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in rect)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8: gloo then carries any dtype."""
    return tensor.contiguous().view(-1).view(torch.uint8)
