"""How does a draft keep its weights while an engine sleeps without any?

Sleep level 2 of vLLM drops them with those of the model that verifies drafts. A weight sync brings
the latter back, and the draft's only if it is trained; buffers, such as rotary tables, are no part
of one, and vLLM 0.25 brings back those of the verifying model alone.
"""

import torch
from torch import nn


class DraftWeights:
    """Parameters and buffers of a draft that are its own, and their copy in host memory."""

    def __init__(self, draft: nn.Module, target: nn.Module) -> None:
        """Note whose they are.

        Args:
            draft: the model that makes drafts.
            target: the model that verifies them; what both share comes with the weight sync.
        """
        self._draft, self._target = draft, target
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Of host memory that the copy takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())

    def keep(self, *, buffers_only: bool = False) -> None:
        """Copy them to the host, unless they are there.

        Args:
            buffers_only: a weight sync will bring the parameters.
        """
        if not self._kept:
            dropped = dict(self._draft.named_parameters()) if buffers_only else {}
            own = self._own().items()
            self._kept = {name: _to_host(tensor) for name, tensor in own if name not in dropped}

    def forget(self) -> None:
        """Others have taken their places."""
        self._kept = {}

    @torch.no_grad()
    def give_back(self) -> None:
        """Write the copy where it was made of, if there is one."""
        own = self._own() if self._kept else {}
        for name, kept in self._kept.items():
            own[name].copy_(kept)

    def _own(self) -> dict[str, torch.Tensor]:
        shared = {id(tensor) for tensor in _tensors(self._target).values()}
        tensors = _tensors(self._draft)
        return {name: tensor for name, tensor in tensors.items() if id(tensor) not in shared}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cpu:
        return tensor.detach().clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor.detach())
