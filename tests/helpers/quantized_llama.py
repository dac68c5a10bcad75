"""Tiny checkpoints as AWQ and GPTQ write them, and the model that their numbers stand for.

Four bits per weight; `GROUP` rows of a column share a scale (and a zero point).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from tests.helpers.tiny_llama import save_tiny_llama

GROUP = 32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each of the eight numbers that an int32 holds, lowest bits first."""


def save_quantized(directory: Path, method: str) -> LlamaForCausalLM:
    """Write a quantised checkpoint; returns the model with the weights that it stands for."""
    model = save_tiny_llama(directory)
    tensors = {}
    for name, tensor in model.state_dict().items():
        module, _, own = name.rpartition(".")
        if module.rpartition(".")[2] not in LINEAR:
            tensors[name] = tensor.to(torch.float16)
            continue
        numbers, zeros, scales = _quantize(tensor.T.contiguous(), symmetric=method == "gptq")
        rows = torch.arange(len(numbers)) // GROUP
        with torch.no_grad():
            tensor.copy_(((numbers - zeros[rows]) * scales[rows].float()).T)
        pack = _awq if method == "awq" else _gptq
        tensors |= {f"{module}.{key}": value for key, value in pack(numbers, zeros).items()}
        tensors[f"{module}.scales"] = scales
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP} | (
        {"zero_point": True, "version": "gemm"}
        if method == "awq"
        else {"desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    )
    (directory / "config.json").write_text(json.dumps(config))
    return model


def _quantize(
    weight: torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[in, out] floats to numbers in 0..15 [in, out], zeros and scales [groups, out]."""
    groups = weight.view(-1, GROUP, weight.shape[1])
    if symmetric:
        scales = (groups.abs().amax(dim=1) / 7).to(torch.float16)
        zeros = torch.full_like(scales, 8, dtype=torch.int32)
    else:
        low, high = groups.amin(dim=1), groups.amax(dim=1)
        scales = ((high - low) / 15).to(torch.float16)
        zeros = (-low / scales.float()).round().clamp(0, 15).to(torch.int32)
    numbers = (groups / scales.float()[:, None]).round() + zeros[:, None]
    return numbers.clamp(0, 15).to(torch.int32).view(weight.shape), zeros, scales


def _awq(numbers: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"qweight": _pack(numbers, AWQ_ORDER), "qzeros": _pack(zeros, AWQ_ORDER)}


def _gptq(numbers: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    # rows are packed, and zero points are written one too low
    return {
        "qweight": _pack(numbers.T.contiguous(), range(8)).T.contiguous(),
        "qzeros": _pack(zeros - 1, range(8)),
        "g_idx": (torch.arange(len(numbers)) // GROUP).to(torch.int32),
    }


def _pack(numbers: torch.Tensor, order) -> torch.Tensor:
    """[rows, columns] in 0..15 to int32 [rows, columns / 8]."""
    parts = numbers.view(len(numbers), -1, 8).to(torch.int64)
    packed = sum(parts[..., column] << (4 * place) for place, column in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
