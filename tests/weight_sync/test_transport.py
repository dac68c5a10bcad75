"""What does an export hand out, and does a rank that opened it read exactly the planned bytes?"""

import ctypes
import pickle

import numpy as np
import pytest
import torch

from chatlearn_vllm.layouts.blocks import Rect
from chatlearn_vllm.weight_sync.pieces import Spans, SpanTable, addresses_of, form_of, view_of
from chatlearn_vllm.weight_sync.planner import Copy
from chatlearn_vllm.weight_sync.transport import Export, OpenedExport, Puller, export_tensors


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    return torch.arange(1, count + 1).view(shape).to(dtype)


def carried(export: Export) -> Export:
    """As it arrives in another process."""
    return pickle.loads(pickle.dumps(export))


def test_tensors_of_one_storage_are_handed_out_together_and_open_where_they_lie() -> None:
    memory = numbers(400)
    tensors = {
        "rows": memory[100:220].view(12, 10),
        "columns": memory[:200].view(10, 20)[2:8, 5:15],
        "tied": memory[100:220].view(12, 10),
        "bits": memory.view(torch.int32)[7:9],
        "other": numbers(3, 4, dtype=torch.bfloat16),
    }
    export = export_tensors(tensors, generation=5)
    assert [array.nbytes for array in export.memories] == [1600, 24]
    assert export.places[1, export.names.index("columns")] == 4 * 45

    opened = OpenedExport(carried(export))
    memory.zero_()  # not seen by who opened the carried copy
    assert opened.generation == 5
    expected = numbers(400)
    assert torch.equal(opened.tensors["rows"], expected[100:220].view(12, 10))
    assert torch.equal(opened.tensors["tied"], opened.tensors["rows"])
    assert torch.equal(opened.tensors["columns"], expected[:200].view(10, 20)[2:8, 5:15])
    assert torch.equal(opened.tensors["bits"], expected.view(torch.int32)[7:9])
    assert torch.equal(opened.tensors["other"], tensors["other"])
    assert opened.forms["columns"] == (torch.float32, (6, 10), (20, 1))
    opened.close()
    assert not opened.tensors


def test_a_pull_fills_the_planned_rectangles_with_converted_values_and_nothing_else() -> None:
    sent = {
        "qkv": numbers(12, 10),
        "expert": numbers(6, 8),
        "slot": numbers(4, 6, 8),
        "bias": numbers(9, dtype=torch.bfloat16),
    }
    copies = [
        # into the middle of a matrix, from the middle of another
        Copy(0, "qkv", ((3, 9), (2, 7)), "fused", ((1, 7), (4, 9))),
        # a whole matrix into one expert's slot, a part of a slot into a matrix, slot to slot
        Copy(0, "expert", ((0, 6), (0, 8)), "experts", ((2, 3), (0, 6), (0, 8))),
        Copy(1, "slot", ((3, 4), (1, 5), (0, 8)), "flat", ((0, 4), (0, 8))),
        Copy(1, "slot", ((0, 1), (2, 4), (3, 8)), "experts", ((0, 1), (4, 6), (0, 5))),
        # other dtypes
        Copy(1, "bias", ((2, 9),), "float_bias", ((0, 7),)),
        Copy(0, "qkv", ((9, 12), (0, 10)), "half", ((0, 3), (0, 10))),
    ]
    targets = {
        "fused": numbers(8, 12),
        "experts": numbers(3, 6, 8),
        "flat": numbers(5, 8),
        "float_bias": numbers(7),
        "half": numbers(4, 10, dtype=torch.bfloat16),
    }
    expected = {name: tensor.clone() for name, tensor in targets.items()}
    expected["fused"][1:7, 4:9] = sent["qkv"][3:9, 2:7]
    expected["experts"][2] = sent["expert"]
    expected["flat"][:4] = sent["slot"][3, 1:5]
    expected["experts"][0, 4:6, :5] = sent["slot"][0, 2:4, 3:]
    expected["float_bias"][:] = sent["bias"][2:]
    expected["half"][:3] = sent["qkv"][9:]
    opened = {
        rank: OpenedExport(carried(export_tensors({name: sent[name] for name in names})))
        for rank, names in enumerate((("qkv", "expert"), ("slot", "bias")))
    }

    puller = Puller(copies)
    for _ in range(2):
        puller.pull(opened, targets)

    for name, tensor in targets.items():
        assert torch.equal(tensor, expected[name]), name


PIECES: list[tuple[str, Rect]] = [
    ("matrix", ((0, 6), (0, 10))),
    ("matrix", ((2, 5), (0, 10))),
    ("matrix", ((2, 5), (3, 7))),
    ("matrix", ((4, 5), (3, 7))),
    ("window", ((1, 4), (0, 4))),
    ("experts", ((2, 3), (0, 4), (0, 6))),
    ("experts", ((1, 2), (1, 3), (2, 6))),
    ("vector", ((3, 8),)),
]
SPANS = [(1, 240), (1, 120), (3, 16), (1, 16), (3, 16), (1, 48), (2, 8), (1, 20)]
"""Number of spans, and bytes of each. A rectangle of one row is one span, however it lies."""


def parameters() -> dict[str, torch.Tensor]:
    return {
        "matrix": numbers(6, 10),
        "window": numbers(7, 9)[2:6, 3:7],
        "experts": numbers(3, 4, 6, dtype=torch.bfloat16),
        "vector": numbers(9),
    }


def read(spans: Spans, number: int) -> bytes:
    """The bytes of a rectangle, straight from memory."""
    address, rows, width, pitch = (int(column[number]) for column in spans)
    return b"".join(ctypes.string_at(address + row * pitch, width) for row in range(rows))


def test_spans_tell_where_the_bytes_of_rectangles_lie_also_after_tensors_have_moved() -> None:
    tensors = parameters()
    table = SpanTable({name: form_of(tensor) for name, tensor in tensors.items()}, PIECES)
    for _ in range(2):
        spans = table.at(addresses_of(tensors, tensors))
        for number, (name, rect) in enumerate(PIECES):
            view = view_of(tensors[name], rect).contiguous()
            assert read(spans, number) == view.view(torch.uint8).numpy().tobytes(), (name, rect)
        tensors = {name: tensor * 2 for name, tensor in parameters().items()}
        window = torch.zeros(7, 9)[2:6, 3:7]
        tensors["window"] = window.copy_(tensors["window"])
    assert (spans.rows * spans.width).sum() == 240 + 120 + 48 + 16 + 48 + 48 + 16 + 20


def test_rows_without_gaps_are_one_span() -> None:
    tensors = parameters()
    table = SpanTable({name: form_of(tensor) for name, tensor in tensors.items()}, PIECES)
    spans = table.at(addresses_of(tensors, tensors))
    assert list(zip(spans.rows.tolist(), spans.width.tolist(), strict=True)) == SPANS
    assert table.row_bytes.tolist() == [40, 40, 16, 16, 16, 12, 8, 20]


def test_columns_that_are_apart_are_refused() -> None:
    transposed = numbers(6, 10).t()
    with pytest.raises(ValueError, match=r"weight: the last dimension is not contiguous .*1, 10"):
        SpanTable({"weight": form_of(transposed)}, [("weight", ((0, 2), (0, 2)))])


def test_a_single_column_may_have_any_stride() -> None:
    column = numbers(2, 6).t()[:, 1:]  # strides (1, 6)
    table = SpanTable({"column": form_of(column)}, [("column", ((1, 5), (0, 1)))])
    spans = table.at(addresses_of({"column": column}, ["column"]))
    assert (spans.rows.tolist(), spans.width.tolist()) == ([1], [16])
    assert read(spans, 0) == column[1:5].flatten().numpy().tobytes()


def test_address_width_and_pitch_must_be_aligned() -> None:
    columns = [16, 8, 16, 16], [1, 2, 2, 2], [32, 32, 24, 32], [32, 32, 32, 40]
    spans = Spans(*(np.array(column) for column in columns))
    assert spans.is_aligned(16).tolist() == [True, False, False, False]
    assert spans.is_aligned(8).all() and spans.is_aligned(4).all()
    assert not spans.is_aligned(64).any()
