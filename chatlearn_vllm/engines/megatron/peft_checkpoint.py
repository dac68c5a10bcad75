"""How do adapters become a directory that the PEFT library and vLLM load beside the base model?

A layer here may be several modules there (q, k and v in one matrix). They share its A, and each has
its own rows of B.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from chatlearn_vllm.engines.megatron.files import atomic_directory, rank
from chatlearn_vllm.engines.megatron.hf_checkpoint import LaidOut, gather_logical_tensors
from chatlearn_vllm.layouts import ModelShape, ParamLayout
from chatlearn_vllm.layouts.blocks import Block

if TYPE_CHECKING:
    from chatlearn_vllm.config import ModelArgs

_A, _B = ".lora_A.weight", ".lora_B.weight"


def save_peft(
    directory: Path,
    parameters: list[LaidOut],
    adapters: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    model: ModelShape,
    args: "ModelArgs",
) -> None:
    """Write adapter_config.json and adapter_model.safetensors. Collective over all ranks.

    Args:
        directory: replaced if it exists, whole or not at all.
        parameters: this rank's weights, less those that another data parallel copy writes.
        adapters: (A, B) by the name of the weight.
        model: sizes of the model.
        args: rank and alpha of the adapters, and where the base model came from.
    """
    parts = [
        part
        for layout, _ in parameters
        if layout.name in adapters
        for part in _laid_out(layout, *adapters[layout.name])
    ]

    def shape_of(name: str) -> tuple[int, ...]:
        out_size, in_size = model.tensor_shape(_weight_name(name))
        return (args.lora_r, in_size) if name.endswith(_A) else (out_size, args.lora_r)

    with atomic_directory(directory) as temporary:
        tensors = dict(gather_logical_tensors(parts, shape_of))
        if rank() == 0:
            save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
            modules = sorted({name.removesuffix(_A).rpartition(".")[2] for name in tensors
                              if name.endswith(_A)})  # fmt: skip
            config = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": args.load,
                "r": args.lora_r,
                "lora_alpha": args.lora_alpha,
                "lora_dropout": 0.0,
                "target_modules": modules,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            }
            text = json.dumps(config, indent=2) + "\n"
            (temporary / "adapter_config.json").write_text(text)


def _laid_out(layout: ParamLayout, A: torch.Tensor, B: torch.Tensor) -> Iterator[LaidOut]:
    """A once for each module in the layer, and B, whose rows are those of the weight."""
    all_r = (0, A.size(0))
    columns = {block.tensor: block.logical[1] for block in layout.blocks}
    for tensor, range_ in columns.items():
        local = (all_r, (0, A.size(1)))
        block = Block(_peft_name(tensor, _A), (all_r, range_), local)
        yield LaidOut(ParamLayout(f"{layout.name} A of {tensor}", tuple(A.shape), (block,)), A)
    blocks = tuple(
        Block(_peft_name(block.tensor, _B), (block.logical[0], all_r), (block.local[0], all_r))
        for block in layout.blocks
    )
    yield LaidOut(ParamLayout(f"{layout.name} B", tuple(B.shape), blocks), B)


def _peft_name(tensor: str, suffix: str) -> str:
    return f"base_model.model.{tensor.removesuffix('.weight')}{suffix}"


def _weight_name(peft_name: str) -> str:
    module = peft_name.removesuffix(_A).removesuffix(_B)
    return module.removeprefix("base_model.model.") + ".weight"
