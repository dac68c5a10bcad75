"""How does a draft keep its weights while an engine sleeps without any?

No weight sync brings them back: a trainer has the model that verifies drafts, not the one that
makes them. Sleep level 2 of vLLM drops both.
"""

import torch
from torch import nn


class DraftWeights:
    """Parameters and buffers of a draft that are its own, and their copy in host memory."""

    def __init__(self, draft: nn.Module, target: nn.Module) -> None:
        """Find them.

        Args:
            draft: the model that makes drafts.
            target: the model that verifies them; what both share comes with the weight sync.
        """
        shared = {id(tensor) for tensor in _tensors(target)}
        self._own = [tensor for tensor in _tensors(draft) if id(tensor) not in shared]
        self._kept: list[torch.Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """Of host memory, once they were kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._own)

    def keep(self) -> None:
        """Copy them to the host. Once is enough: they do not change."""
        if self._kept is None:
            self._kept = [_to_host(tensor) for tensor in self._own]

    @torch.no_grad()
    def give_back(self) -> None:
        """Write them where they were, if they were kept."""
        for tensor, kept in zip(self._own, self._kept or self._own, strict=True):
            if tensor is not kept:
                tensor.copy_(kept)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cpu:
        return tensor.detach().clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor.detach())
