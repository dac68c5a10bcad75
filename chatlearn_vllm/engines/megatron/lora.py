"""How are low-rank adapters trained in place of the weights they are added to?

A linear layer computes W x + scale * B (A x) with frozen W and trained A [r, in] and B [out, r];
scale is lora_alpha / lora_r. Under tensor parallelism a rank holds of A and B just what the change
of its own part of W is made of:

    column parallel   W cut along out    A whole, B cut along out
    row parallel      W cut along in     A cut along in, B whole

so merging needs no communication. What the ranks exchange in a step has r columns, never more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import Parameter

from chatlearn_vllm.engines.megatron.model import named_modules

if TYPE_CHECKING:
    from chatlearn_vllm.config import ModelArgs

_SUFFIXES = (".lora_a", ".lora_b")


def add_adapters(chunks: list[GPTModel], args: ModelArgs) -> None:
    """Freeze this rank's part of a model and add an adapter to each layer of `target_modules`.

    The layers stay where they are and keep the names of their weights; A and B come beside these
    as `lora_a` and `lora_b`. A is drawn from the seed and the name, equally for any parallel
    sizes; B is zero.

    Raises:
        ValueError: a target is missing, or is a layer that cannot have an adapter.
    """
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        parameter.requires_grad_(False)
    missing = set(args.target_modules)
    for name, module in named_modules(chunks):
        kind = name.rpartition(".")[2]
        if kind in args.target_modules:
            _adapt(name, module, args)
            missing.discard(kind)
    if missing:
        raise ValueError(
            f"target_modules={list(args.target_modules)}: the model has no layer "
            f"{', '.join(sorted(missing))}; leave it out"
        )
    for chunk in chunks:
        if chunk.config.recompute_granularity and chunk.pre_process:
            # A recomputed segment has gradients only if its input has, and no weight before the
            # first adapter is trained.
            chunk.embedding.register_forward_hook(_require_gradient)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of A or B."""
    return name.endswith(_SUFFIXES)


def adapted_layers(chunks: list[GPTModel]) -> Iterator[tuple[str, AdaptedLinear]]:
    """The layers with adapters, by the names of `named_modules`."""
    for name, module in named_modules(chunks):
        if isinstance(module, AdaptedLinear):
            yield name, module


@contextmanager
def adapters_disabled(chunks: list[GPTModel]) -> Iterator[None]:
    """Within the block the model computes with its frozen weights alone."""
    layers = [layer for _, layer in adapted_layers(chunks)]
    for layer in layers:
        layer.is_adapter_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_adapter_enabled = True


class AdaptedLinear(torch.nn.Module):
    """What both kinds of layers share: the parameters and the sum."""

    lora_a: Parameter
    """[r, in], in / tp columns of it if row parallel."""
    lora_b: Parameter
    """[parts, out / parts, r], cut along `out / parts` if column parallel. There are two parts
    where the rows of a rank's weight are [gate; up], so that the cut is one of both halves."""
    lora_scale: float
    is_adapter_enabled: bool

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [r, in], B [out, r]) of this rank's part of the weight; not copied."""
        return self.lora_a.data, self.lora_b.data.flatten(0, 1)

    def _add_change(self, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """output [..., out] + scale * B hidden, hidden [..., r]; one kernel on a GPU."""
        B = self.lora_b.flatten(0, 1)
        total = torch.addmm(
            output.flatten(0, -2), hidden.flatten(0, -2), B.t(), alpha=self.lora_scale
        )
        return total.view_as(output)

    def _sharded(
        self, axes: dict[str, int], prefix: str, sharded_offsets: tuple, metadata: dict[str, Any]
    ) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class AdaptedColumnParallelLinear(AdaptedLinear, ColumnParallelLinear):
    """A column parallel layer with an adapter."""

    def forward(
        self, input_: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As upstream."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.is_adapter_enabled:
            return output, bias
        hidden = F.linear(input_, self.lora_a)  # [s, b, r]; [s / tp, b, r] if sequence parallel
        # Backward both sum the gradient of `hidden`, of which each rank's part of B has a share.
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self._add_change(output, hidden), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As upstream, with the place of the adapter."""
        axes = {"weight": 0, "bias": 0, "lora_b": 1}
        return self._sharded(axes, prefix, sharded_offsets, metadata)


class AdaptedRowParallelLinear(AdaptedLinear, RowParallelLinear):
    """A row parallel layer with an adapter."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As upstream."""
        output, bias = super().forward(input_)
        if not self.is_adapter_enabled:
            return output, bias
        hidden = F.linear(input_, self.lora_a)  # [s, b, r], this rank's share of a sum
        if self.sequence_parallel:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self._add_change(output, hidden), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As upstream, with the place of the adapter."""
        return self._sharded({"weight": 1, "lora_a": 1}, prefix, sharded_offsets, metadata)


def _adapt(name: str, layer: torch.nn.Module, args: ModelArgs) -> None:
    """Make a layer of megatron-core one with an adapter, in place."""
    is_column = type(layer) is ColumnParallelLinear
    if not is_column and type(layer) is not RowParallelLinear:
        raise ValueError(
            f"target_modules: {name} is a {type(layer).__name__}; adapters go to megatron-core's "
            "own ColumnParallelLinear and RowParallelLinear"
        )
    if layer.is_expert:
        raise ValueError(
            f"target_modules={list(args.target_modules)}: {name} is an expert's layer, which "
            "cannot have an adapter; name only linear_qkv and linear_proj"
        )
    out_size, in_size = layer.weight.shape
    is_gated = layer.config.gated_linear_unit and name.endswith("linear_fc1")
    num_parts = 2 if is_gated else 1
    A = _initial_a(name, layer, args)[:, _columns(layer)]
    lora_a = Parameter(A.to(layer.weight))
    lora_b = Parameter(layer.weight.new_zeros(num_parts, out_size // num_parts, args.lora_r))
    # What megatron-core reads: the norm of the gradients counts a parameter that is whole on every
    # rank once, and sums gradients over ranks that saw different parts of the sequence.
    cut, whole = (lora_b, lora_a) if is_column else (lora_a, lora_b)
    set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=1, stride=1)
    whole.sequence_parallel = layer.sequence_parallel
    for parameter in (lora_a, lora_b):
        parameter.allreduce = True
    assert lora_a.shape == (args.lora_r, in_size)
    # Chosen for this instance only; megatron-core's own names keep their classes.
    layer.__class__ = AdaptedColumnParallelLinear if is_column else AdaptedRowParallelLinear
    layer.lora_a, layer.lora_b = lora_a, lora_b
    layer.lora_scale = args.lora_alpha / args.lora_r
    layer.is_adapter_enabled = True


def _initial_a(name: str, layer: torch.nn.Module, args: ModelArgs) -> torch.Tensor:
    """All of A [r, in], uniform within 1 / sqrt(in), as torch initialises a linear layer."""
    digest = hashlib.sha256(f"{args.seed} {name}.lora_a".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(layer.input_size)
    A = torch.empty(args.lora_r, layer.input_size)
    return A.uniform_(-bound, bound, generator=generator)


def _columns(layer: torch.nn.Module) -> slice:
    """This rank's columns of A."""
    if isinstance(layer, ColumnParallelLinear):
        return slice(None)
    start = layer.tp_group.rank() * layer.input_size_per_partition
    return slice(start, start + layer.input_size_per_partition)


def _require_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()
