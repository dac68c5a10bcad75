"""How is it proved that the bytes which arrived are those that were sent?

Both sides form the digests of the same rectangles, each through its own names and addresses: the
sender of what it holds, the reader of its live parameters after the copy. Equal lists mean that
every rectangle arrived where the reader's model looks for it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from chatlearn_vllm.layouts.blocks import whole
from chatlearn_vllm.weight_sync import kernels
from chatlearn_vllm.weight_sync.digest import EVERYTHING, Sample, digests
from chatlearn_vllm.weight_sync.pieces import Piece, SpanTable, addresses_of, form_of, view_of


class Digester:
    """Digests of rectangles of this process's tensors, again and again.

    On a GPU a kernel forms them all at once, at the speed of the memory.
    """

    def __init__(
        self, pieces: Sequence[Piece], dtypes: Sequence[torch.dtype | None] | None = None
    ) -> None:
        """Choose the rectangles.

        Args:
            pieces: tensor names and rectangles.
            dtypes: what the values are converted to first; None, or a None in it, for no change.
        """
        self._pieces = list(pieces)
        self._dtypes = list(dtypes or [None] * len(self._pieces))
        self._plain: np.ndarray | None = None
        self._table: SpanTable | None = None
        self._grouped: kernels.GroupedDigest | None = None
        self._addresses: dict[str, int] | None = None

    @torch.no_grad()
    def digests(
        self, tensors: Mapping[str, torch.Tensor], sample: Sample = EVERYTHING
    ) -> np.ndarray:
        """Digests of the rectangles as they are now; waits for the device.

        Args:
            tensors: by name.
            sample: which part of each rectangle is read.

        Returns:
            int64 [pieces].
        """
        if not self._pieces:
            return np.empty(0, dtype=np.int64)
        if not tensors[self._pieces[0][0]].is_cuda:
            views = [self._view(number, tensors) for number in range(len(self._pieces))]
            return digests(views, sample)
        if self._plain is None:
            self._prepare(tensors)
        result = np.empty(len(self._pieces), dtype=np.int64)
        if self._plain.any():
            result[self._plain] = self._fused(tensors, sample)
        for number in np.flatnonzero(~self._plain):
            result[number] = _on_device(self._view(number, tensors), sample)
        return result

    def _view(self, number: int, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        name, rect = self._pieces[number]
        view, dtype = view_of(tensors[name], rect), self._dtypes[number]
        return view if dtype is None else view.to(dtype)

    def _prepare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._plain = np.array(
            [
                dtype is None or dtype == tensors[name].dtype
                for (name, _), dtype in zip(self._pieces, self._dtypes, strict=True)
            ]
        )
        pieces = [piece for piece, plain in zip(self._pieces, self._plain, strict=True) if plain]
        self._names = sorted({name for name, _ in self._pieces})
        self._table = SpanTable({name: form_of(tensors[name]) for name, _ in pieces}, pieces)

    def _fused(self, tensors: Mapping[str, torch.Tensor], sample: Sample) -> np.ndarray:
        addresses = addresses_of(tensors, self._names)
        if addresses != self._addresses:
            device = tensors[self._pieces[0][0]].device
            spans = self._table.at(addresses)
            self._grouped = kernels.GroupedDigest(spans, self._table.row_bytes, device)
            self._addresses = addresses
        return self._grouped.run(sample).cpu().numpy()


def _on_device(view: torch.Tensor, sample: Sample) -> int:
    """Digest of one tensor on a GPU."""
    digester = Digester([("", whole(tuple(view.shape)))])
    return int(digester.digests({"": view.contiguous()}, sample)[0])
