"""Where do the tensors of a checkpoint lie in a Hugging Face model, and who holds their memory?"""

from __future__ import annotations

import torch
from torch import nn

from chatlearn_vllm.layouts import ModelShape
from chatlearn_vllm.layouts.model import layer_and_expert


def tensors_in(model: nn.Module, shape: ModelShape) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint as views into a model's parameters.

    Transformers keeps the experts of a layer in two parameters: `gate_up_proj` [experts, 2 x ffn,
    hidden] and `down_proj` [experts, hidden, ffn].

    Args:
        model: of `transformers.AutoModelForCausalLM`.
        shape: sizes of the model.

    Raises:
        ValueError: the model does not hold these tensors, or holds others.
    """
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    views, unused = {}, set(parameters)
    missing = []
    for name in shape.tensor_names():
        owner, view = _find(name, parameters, shape)
        if view is None or tuple(view.shape) != shape.tensor_shape(name):
            missing.append(name)
            continue
        views[name] = view
        unused.discard(owner)
    if missing or unused:
        raise ValueError(
            "Transformers' model differs from config.json as the weight sync reads it: "
            + "; ".join(f"no {name}" for name in missing[:5])
            + "; ".join(f"{name} is in no checkpoint" for name in sorted(unused)[:5])
        )
    return views


def _find(
    name: str, parameters: dict[str, torch.Tensor], shape: ModelShape
) -> tuple[str, torch.Tensor | None]:
    """Name of the parameter that holds a tensor, and the tensor as a part of it."""
    if name in parameters:
        return name, parameters[name]
    layer, expert = layer_and_expert(name)
    names = shape.experts_of(layer) if layer is not None else None
    if names is None:
        return name, None
    block = f"model.layers.{layer}.mlp"
    if expert is None:
        owner = f"{block}.gate.weight"
        return owner, parameters.get(owner)
    ffn = shape.moe_ffn_hidden_size
    for kind, own, rows in (
        (names.gate, "gate_up_proj", slice(0, ffn)),
        (names.up, "gate_up_proj", slice(ffn, 2 * ffn)),
        (names.down, "down_proj", slice(None)),
    ):
        if name.endswith(kind.format(expert=expert)):
            owner = f"{block}.experts.{own}"
            held = parameters.get(owner)
            return owner, None if held is None else held[expert, rows]
    return name, None


class WeightMemory:
    """The memory of a model's parameters, which can be given back and taken again.

    The parameters stay the same objects; views into them do not outlive their memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._on_host: list[torch.Tensor] = []

    @property
    def num_bytes(self) -> int:
        """What the parameters hold on their device now."""
        return sum(parameter.nbytes for parameter in self._parameters)

    def give_back(self, *, keep_on_host: bool) -> None:
        """Free the memory.

        Args:
            keep_on_host: whether the values wait in main memory. Those of a model that is there
                already stay where they are.
        """
        if keep_on_host:
            if self._parameters[0].device.type == "cpu":
                return
            self._on_host = [_pinned_copy(parameter) for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.data = parameter.new_empty(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def take(self) -> None:
        """Take the memory again, with the values that waited in main memory."""
        for parameter, shape in zip(self._parameters, self._shapes, strict=True):
            if parameter.shape != shape:
                parameter.data = parameter.new_empty(shape)
        if self._on_host:
            for parameter, values in zip(self._parameters, self._on_host, strict=True):
                parameter.data.copy_(values)
            self._on_host = []


def _pinned_copy(parameter: nn.Parameter) -> torch.Tensor:
    return torch.empty_like(parameter.data, device="cpu", pin_memory=True).copy_(parameter.data)
