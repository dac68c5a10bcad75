"""How does a model of billions of parameters get weights within a second?"""

from __future__ import annotations

import zlib

import torch

from chatlearn_vllm.engines.megatron.engine import MegatronEngine
from chatlearn_vllm.layouts.blocks import Rect

_CHUNK = 1 << 26
"""Elements that are computed at a time."""


class FilledEngine(MegatronEngine):
    """An engine whose weights are pseudo-random numbers computed where they lie.

    An element depends on the seed, its tensor's name and its place in the tensor, so copies on
    several ranks are equal and any other place holds another number.
    """

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """Give every weight a new value."""
        for layout, data in self.parameters.laid_out():
            data.zero_()
            for block in layout.blocks:
                key = zlib.crc32(f"{seed} {block.tensor}".encode())
                _fill(data[tuple(slice(*bounds) for bounds in block.local)], block.logical, key)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _fill_weights(self) -> None:
        self._lay_in_one_buffer()
        self.fill(seed=0)

    @torch.no_grad()
    def _lay_in_one_buffer(self) -> None:
        """Give the parameters one storage, as the distributed optimizer of a real trainer does."""
        parameters = list(dict.fromkeys(p for chunk in self.chunks for p in chunk.parameters()))
        sizes = [-(-parameter.numel() // 64) * 64 for parameter in parameters]
        dtype = parameters[0].dtype
        buffer = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        for parameter, part in zip(parameters, buffer.split(sizes), strict=True):
            parameter.data = part[: parameter.numel()].view(parameter.shape)


def _fill(data: torch.Tensor, rect: Rect, key: int) -> None:
    """Fill a rectangle of a tensor of one or two dimensions."""
    if data.dim() == 1:
        data, rect = data.unsqueeze(1), (*rect, (0, 1))
    (first, last), (left, right) = rect
    columns = torch.arange(left, right, dtype=torch.int32, device=data.device) * -2048144789
    step = max(1, _CHUNK // (right - left))
    for start in range(first, last, step):
        stop = min(start + step, last)
        rows = torch.arange(start, stop, dtype=torch.int32, device=data.device) * -1640531535
        h = (rows + (key - 2**31)).unsqueeze(1) + columns
        h ^= h >> 15
        h *= -1028477379
        h ^= h >> 13
        data[start - first : stop - first] = ((h & 0xFFFF) - 0x8000) * 1e-6
