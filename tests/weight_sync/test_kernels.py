"""Do the GPU's kernels copy and digest every word once? Run by Triton's interpreter on the CPU."""

import numpy as np
import pytest
import torch

from chatlearn_vllm.layouts.blocks import Rect
from chatlearn_vllm.weight_sync import transport
from chatlearn_vllm.weight_sync.digest import EVERYTHING, Sample, digests
from chatlearn_vllm.weight_sync.kernels import GroupedCopy, GroupedDigest
from chatlearn_vllm.weight_sync.pieces import SpanTable, addresses_of, form_of, view_of
from chatlearn_vllm.weight_sync.planner import Copy
from chatlearn_vllm.weight_sync.transport import OpenedExport, Puller, export_tensors
from chatlearn_vllm.weight_sync.verify import Digester
from tests.helpers.ranks import Ranks

CPU = torch.device("cpu")
SHAPES = {
    "matrix": (130, 512), "tall": (40000, 6), "odd": (30000, 3), "column": (64, 1),
    "wide": (3, 20000), "vector": (778,), "experts": (5, 64, 128),
}  # fmt: skip
PIECES: list[tuple[str, Rect]] = [
    ("matrix", ((0, 130), (0, 512))),
    ("matrix", ((3, 120), (8, 512))),
    ("tall", ((0, 40000), (0, 6))),  # rows of 12 or 24 bytes, aligned to 16 all together
    ("tall", ((11, 900), (2, 6))),
    ("odd", ((0, 30000), (0, 3))),  # bfloat16: rows that end inside a word
    ("column", ((0, 64), (0, 1))),
    ("wide", ((1, 3), (100, 19998))),
    ("vector", ((2, 778),)),
    ("experts", ((2, 3), (5, 60), (0, 128))),
    ("experts", ((4, 5), (0, 64), (6, 18))),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def interpreter():
    """A process in which Triton runs kernels without a GPU; it has to know before its import."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        ranks = Ranks(1)
    yield ranks
    ranks.close()


def numbers(dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def table(tensors: dict[str, torch.Tensor], pieces=PIECES) -> SpanTable:
    return SpanTable({name: form_of(tensor) for name, tensor in tensors.items()}, pieces)


def wrong_after_copies(dtype: torch.dtype) -> list[str]:
    """In the interpreter: tensors that differ from what plain torch makes of the same copies."""
    source, target = numbers(dtype, seed=0), numbers(dtype, seed=1)
    expected = {name: tensor.clone() for name, tensor in target.items()}
    for name, rect in PIECES:
        view_of(expected[name], rect).copy_(view_of(source[name], rect))
    spans = [table(side).at(addresses_of(side, side)) for side in (source, target)]
    GroupedCopy(*spans, np.arange(len(PIECES)) % 3, CPU).run()
    return [name for name in SHAPES if not torch.equal(target[name], expected[name])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rectangles_are_copied_and_nothing_else_changes(interpreter, dtype) -> None:
    assert interpreter.run(wrong_after_copies, dtype) == [[]]


def copy_with_gaps(gaps_are_read: bool) -> tuple[bool, int]:
    """In the interpreter: whether a rectangle arrived, and how much of the wider matrix changed."""
    compact, part = {"weight": torch.randn(50, 40)}, ((5, 55), (20, 60))
    spread = {"weight": torch.randn(60, 100)}
    spans = [
        table(compact, [("weight", ((0, 50), (0, 40)))]).at(addresses_of(compact, compact)),
        table(spread, [("weight", part)]).at(addresses_of(spread, spread)),
    ]
    before = spread["weight"].clone()
    if gaps_are_read:
        spans.reverse()
    GroupedCopy(*spans, np.zeros(1, dtype=np.int64), CPU).run()
    has_arrived = torch.equal(compact["weight"], view_of(spread["weight"], part))
    return has_arrived, int((spread["weight"] != before).sum())


def test_a_rectangle_may_have_gaps_on_one_side_only(interpreter) -> None:
    assert interpreter.run(copy_with_gaps, True) == [(True, 0)]
    assert interpreter.run(copy_with_gaps, False) == [(True, 50 * 40)]


PULLED = [
    Copy(0, "matrix", ((2, 18), (4, 12)), "fused", ((3, 19), (0, 8))),
    Copy(1, "matrix", ((0, 4), (0, 8)), "fused", ((20, 24), (8, 16))),
    Copy(1, "experts", ((2, 3), (1, 7), (0, 16)), "slots", ((0, 1), (2, 8), (0, 16))),
    # other dtypes
    Copy(0, "matrix", ((5, 18), (2, 10)), "half", ((1, 14), (4, 12))),
    Copy(1, "experts", ((1, 2), (3, 8), (4, 12)), "single", ((1, 2), (2, 7), (0, 8))),
    Copy(1, "vector", ((4, 20),), "half_vector", ((0, 16),)),
]


def opened_in_place(tensors: dict[str, torch.Tensor]) -> OpenedExport:
    """As on a GPU: no tensors, only where another process's memory can be read."""
    opened = OpenedExport(export_tensors(tensors))
    opened.tensors, opened.addresses = {}, addresses_of(tensors, tensors)
    return opened


def wrong_after_pulls(staging_bytes: int) -> list[tuple[int, str]]:
    """In the interpreter: sync and tensor that differ from what plain torch makes of it."""
    generator, wrong, puller = torch.Generator().manual_seed(0), [], Puller(PULLED)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    held: list[object] = []  # so that new tensors cannot lie where old ones lay
    for sync in range(4):
        if sync in (0, 2):
            sent = [
                {"matrix": random(20, 12)},
                {
                    "matrix": random(6, 8),
                    "experts": random(3, 8, 16, dtype=torch.bfloat16),
                    "vector": random(24),
                },
            ]
        if sync in (0, 3):
            targets = {
                "fused": random(24, 16),
                "slots": random(2, 8, 16, dtype=torch.bfloat16),
                "half": random(16, 12, dtype=torch.bfloat16),
                "single": random(2, 8, 10),
                "half_vector": random(16, dtype=torch.bfloat16),
            }
        held += [sent, targets]
        for own in sent:
            for tensor in own.values():
                tensor += 1
        expected = {name: tensor.clone() for name, tensor in targets.items()}
        for copy in PULLED:
            source = view_of(sent[copy.source_rank][copy.source_param], copy.source)
            view_of(expected[copy.target_param], copy.target).copy_(source)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transport, "STAGING_BYTES", staging_bytes)
            puller.pull({rank: opened_in_place(own) for rank, own in enumerate(sent)}, targets)
        wrong += [(sync, name) for name in targets if not targets[name].equal(expected[name])]
    return wrong


@pytest.mark.parametrize("staging_bytes", [1, 100, 2**20])
def test_what_several_ranks_show_is_pulled_wherever_it_has_moved(
    interpreter, staging_bytes
) -> None:
    assert interpreter.run(wrong_after_pulls, staging_bytes) == [[]]


def digests_of_kernels(dtype: torch.dtype, samples: list[Sample]) -> list[list[int]]:
    """In the interpreter."""
    tensors = numbers(dtype, seed=0)
    spans, row_bytes = table(tensors).at(addresses_of(tensors, tensors)), table(tensors).row_bytes
    grouped = GroupedDigest(spans, row_bytes, CPU)
    return [grouped.run(sample).tolist() for sample in samples]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digests_are_those_of_the_cpu_for_every_sample(interpreter, dtype) -> None:
    samples = [EVERYTHING, Sample(2, 0), Sample(2, 1), Sample(2, 7), Sample(16, 18)]
    tensors = numbers(dtype, seed=0)
    views = [view_of(tensors[name], rect) for name, rect in PIECES]
    (found,) = interpreter.run(digests_of_kernels, dtype, samples)
    assert found == [digests(views, sample).tolist() for sample in samples]


class OnGPU(torch.Tensor):
    """Says that a GPU has it; the interpreter reads it where it is."""

    is_cuda = True


DIGESTED = [("wide", ((1, 3), (100, 400))), ("matrix", ((3, 90), (8, 512)))] * 2 + [
    ("experts", ((2, 3), (5, 60), (0, 128))),
    ("vector", ((2, 778),)),
]
SAMPLES = [EVERYTHING, Sample(2, 0), Sample(2, 1), Sample(2, 2)]
"""By sync."""


def digests_of_moving_tensors(dtypes: list | None) -> list[list[int]]:
    """In the interpreter: by sync. Tensors change, then move."""
    tensors, digester, found = numbers(torch.float32, seed=0), Digester(DIGESTED, dtypes), []
    held = []  # so that new tensors cannot lie where old ones lay
    for sync, sample in enumerate(SAMPLES):
        shown = {name: tensor.as_subclass(OnGPU) for name, tensor in tensors.items()}
        found.append(digester.digests(shown, sample).tolist())
        held.append(tensors)
        if sync == 2:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor += 1
    return found


@pytest.mark.parametrize(
    "dtypes",
    [
        None,
        [torch.float32, None, torch.bfloat16, torch.bfloat16, None, None],
        [torch.bfloat16] * 6,
    ],
    ids=["as they are", "some converted", "all converted"],
)
def test_a_digester_of_a_gpu_follows_tensors_that_change_and_move(interpreter, dtypes) -> None:
    (found,) = interpreter.run(digests_of_moving_tensors, dtypes)
    tensors, on_cpu = numbers(torch.float32, seed=0), Digester(DIGESTED, dtypes)
    expected = []
    for sample in SAMPLES:
        expected.append(on_cpu.digests(tensors, sample).tolist())
        for tensor in tensors.values():
            tensor += 1
    assert found == expected


def test_rectangles_that_are_no_words_are_refused() -> None:
    tensors = {"weight": torch.zeros(8, 9, dtype=torch.bfloat16)}
    spans = table(tensors, [("weight", ((0, 8), (0, 8)))])
    with pytest.raises(ValueError, match="copied as 32-bit words"):
        GroupedDigest(spans.at(addresses_of(tensors, tensors)), spans.row_bytes, CPU)


@pytest.mark.parametrize(
    "rect",
    [((0, 8), (0, 8)), ((0, 1), (1, 3)), ((2, 3), (0, 7))],
    ids=["rows at odd distances", "an odd beginning", "an odd width"],
)
def test_copies_of_what_are_no_words_on_either_side_are_refused(rect) -> None:
    halves = {"weight": torch.zeros(8, 9, dtype=torch.bfloat16)}
    odd = table(halves, [("weight", rect)]).at(addresses_of(halves, halves))
    even = odd._replace(address=odd.address // 4 * 4, width=odd.width // 4 * 4)
    even = even._replace(pitch=even.width)
    for sides in ((odd, even), (even, odd)):
        with pytest.raises(ValueError, match="copied as 32-bit words"):
            GroupedCopy(*sides, np.zeros(1, dtype=np.int64), CPU)
