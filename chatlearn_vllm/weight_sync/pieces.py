"""Where do the bytes of a rectangle lie in a local parameter? Numbers that a kernel can use."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from chatlearn_vllm.layouts.blocks import Rect

_Name = TypeVar("_Name", bound=Hashable)

Piece = tuple[str, Rect]
"""Name of a tensor and a rectangle in it."""


class TensorForm(NamedTuple):
    """How a tensor lies in memory, wherever that is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""


def form_of(tensor: torch.Tensor) -> TensorForm:
    """The form of a tensor of this process."""
    return TensorForm(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


class Spans(NamedTuple):
    """Many rectangles as spans of bytes; one entry of each column (int64) per rectangle.

    Rectangle i is `rows[i]` spans of `width[i]` bytes, `pitch[i]` bytes from one start to the next.
    """

    address: np.ndarray
    """Of the first byte."""
    rows: np.ndarray
    width: np.ndarray
    pitch: np.ndarray

    def is_aligned(self, to: int) -> np.ndarray:
        """Which rectangles consist of whole words of `to` bytes at multiples of `to` bytes."""
        return (self.address % to == 0) & (self.width % to == 0) & (self.pitch % to == 0)


class SpanTable:
    """Rectangles of tensors whose addresses may change, while their forms do not."""

    def __init__(
        self, forms: Mapping[_Name, TensorForm], pieces: Sequence[tuple[_Name, Rect]]
    ) -> None:
        """Work out the spans relative to the tensors' first bytes.

        Args:
            forms: by name, of any kind; contiguous in the last dimension.
            pieces: at most the last two ranges of a rectangle may span more than one element.

        Raises:
            ValueError: a tensor's last dimension is not contiguous.
        """
        self._names = sorted({name for name, _ in pieces})
        index = {name: number for number, name in enumerate(self._names)}
        self._tensor = np.array([index[name] for name, _ in pieces], dtype=np.int64)
        columns = np.empty((4, len(pieces)), dtype=np.int64)
        for number, (name, rect) in enumerate(pieces):
            columns[:, number] = _span(name, forms[name], rect)
        self._offsets = Spans(*columns)
        self.row_bytes = np.array(
            [(rect[-1][1] - rect[-1][0]) * forms[name].dtype.itemsize for name, rect in pieces],
            dtype=np.int64,
        )
        """Of a row of each rectangle, however it lies."""

    def at(self, addresses: Mapping[_Name, int]) -> Spans:
        """The spans, given the address of each tensor's first element."""
        bases = np.array([addresses[name] for name in self._names], dtype=np.int64)
        return self._offsets._replace(address=self._offsets.address + bases[self._tensor])


def addresses_of(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, int]:
    """Addresses of the first elements of tensors of this process."""
    # vLLM's parameters are a subclass whose every call takes a detour.
    with torch._C.DisableTorchFunctionSubclass():
        return {name: tensors[name].data_ptr() for name in names}


def view_of(tensor: torch.Tensor, rect: Rect, num_dims: int | None = None) -> torch.Tensor:
    """The rectangle as a view; leading dimensions of one element are dropped down to `num_dims`."""
    view = tensor[tuple(slice(start, stop) for start, stop in rect)]
    while num_dims is not None and view.dim() > num_dims:
        view = view[0]
    return view


def _span(name: Hashable, form: TensorForm, rect: Rect) -> tuple[int, int, int, int]:
    """Offset in bytes, rows, width and pitch."""
    strides, size = form.stride, form.dtype.itemsize
    if form.shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(f"{name}: the last dimension is not contiguous (strides {strides})")
    start = sum(first * stride for (first, _), stride in zip(rect, strides, strict=True))
    width = (rect[-1][1] - rect[-1][0]) * size
    rows = rect[-2][1] - rect[-2][0] if len(rect) > 1 else 1
    pitch = strides[-2] * size if len(rect) > 1 else width
    if pitch == width:
        width, rows = rows * width, 1
        pitch = width
    return start * size, rows, width, pitch
