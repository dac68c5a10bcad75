"""Are digests what their definition says, do faults change them, do samples cover every byte?"""

import itertools

import numpy as np
import pytest
import torch

from chatlearn_vllm.weight_sync.digest import EVERYTHING, UNIT_WORDS, Sample, digests
from chatlearn_vllm.weight_sync.pieces import view_of
from chatlearn_vllm.weight_sync.verify import Digester

A, B, C = 2654435761, 2246822519, 3266489917
"""PRIME32_1, 2 and 3 of xxHash; each is odd, so that multiplying loses nothing."""


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def sum_of_hashes(data: bytes, first_word: int = 0) -> int:
    """The definition, word by word in Python's own integers; as int64."""
    data += bytes(-len(data) % 4)
    total = 0
    for i in range(len(data) // 4):
        word = int.from_bytes(data[4 * i : 4 * i + 4], "little")
        h = (A * word + B * (first_word + i)) % 2**32
        h ^= h >> 15
        h = h * B % 2**32
        h ^= h >> 13
        h = h * C % 2**32
        total += h ^ (h >> 16)
    return as_int64(total)


def as_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    "tensor",
    [
        numbers(5, 7),
        numbers(9),
        numbers(1, dtype=torch.bfloat16),
        numbers(3, 5, dtype=torch.bfloat16),  # 30 bytes: the last word is half filled
        numbers(64, 1, dtype=torch.bfloat16),
        numbers(3, 7, dtype=torch.float8_e4m3fn),  # 21 bytes: the last word has one
        numbers(5, 3, dtype=torch.float8_e4m3fn),  # 15 bytes: the last word lacks one
        numbers(300, 301),  # several units
        numbers(200_000),  # more words than are worked on at a time
        numbers(4, 6, dtype=torch.float64),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
def test_a_digest_is_the_sum_of_hashed_words(tensor) -> None:
    assert digests([tensor]).tolist() == [sum_of_hashes(raw(tensor))]


def test_only_values_and_their_order_count_and_not_where_they_lie() -> None:
    tensor = numbers(6, 8)
    wide, slots = torch.zeros(10, 20), torch.zeros(3, 6, 8)
    wide[2:8, 5:13] = tensor
    slots[1] = tensor
    views = [tensor, wide[2:8, 5:13], slots[1:2], tensor.t().contiguous().t()]
    assert set(digests(views).tolist()) == {sum_of_hashes(raw(tensor))}
    assert digests([tensor.t()])[0] != digests([tensor])[0]


def test_every_changed_or_exchanged_or_lost_word_is_noticed() -> None:
    tensor = numbers(8, 8)
    flat = tensor.view(-1)
    changed = []
    for i in range(64):
        changed.append(flat.clone())
        changed[-1][i] = -flat[i]  # one bit
    for i, j in itertools.combinations(range(64), 2):
        changed.append(flat.clone())
        changed[-1][[i, j]] = flat[[j, i]]
    for row in range(8):
        for value in (0.0, tensor[row - 1]):  # never arrived; another row arrived here
            changed.append(tensor.clone())
            changed[-1][row] = value
    changed += [tensor.roll(shift, dim) for dim in (0, 1) for shift in range(1, 8)]
    changed += [tensor.flip(0), tensor.t(), torch.zeros(8, 8)]
    found = digests([view.reshape(8, 8) for view in changed])
    assert (found != sum_of_hashes(raw(tensor))).all()


@pytest.mark.parametrize("stride", [2, 3, 16])
def test_consecutive_samples_take_each_unit_once_or_where_there_are_few_at_least_once(
    stride,
) -> None:
    for num_units, first in itertools.product(range(1, 50), range(5)):
        taken = [Sample(stride, phase).units(num_units) for phase in range(first, first + stride)]
        assert all(taken)
        times = np.bincount(list(itertools.chain(*taken)), minlength=num_units)
        assert times.size == num_units
        assert set(times) == {1} if num_units >= stride else times.min() >= 1


@pytest.mark.parametrize(
    "tensor",
    [numbers(1000, 100), numbers(1000, 202, dtype=torch.bfloat16), numbers(9, UNIT_WORDS + 3)],
    ids=["units of 163 rows", "units of 162 rows", "rows longer than a unit"],
)
def test_a_sample_takes_whole_rows_of_about_64_kib(tensor) -> None:
    data, row_bytes = raw(tensor), len(raw(tensor[0]))
    step = max(1, 2**16 // row_bytes) * row_bytes
    units = [sum_of_hashes(data[at : at + step], at // 4) for at in range(0, len(data), step)]
    assert len(units) >= 7
    for stride in (2, 5):
        found = [int(digests([tensor], Sample(stride, phase))[0]) for phase in range(stride)]
        assert found == [as_int64(sum(units[phase::stride])) for phase in range(stride)]
        assert as_int64(sum(found)) == digests([tensor])[0]


def test_a_slot_of_an_expert_is_sampled_as_the_matrix_that_it_holds() -> None:
    matrix = numbers(1000, 100)
    slots = torch.stack([-matrix, matrix, 2 * matrix])
    for sample in (Sample(2, 0), Sample(2, 1), Sample(5, 3)):
        values = digests([matrix, slots[1:2], slots[1:2].unsqueeze(0)], sample)
        assert len(set(values.tolist())) == 1


@pytest.mark.parametrize(
    "tensor",
    [numbers(50000), numbers(40001, 3, dtype=torch.bfloat16), numbers(40, 9)],
    ids=["a vector", "rows that end inside a word", "less than 64 KiB"],
)
def test_every_sample_takes_all_of_a_rectangle_that_is_one_unit(tensor) -> None:
    whole = digests([tensor])
    for sample in (Sample(2, 0), Sample(2, 1), Sample(16, 7)):
        assert (digests([tensor], sample) == whole).all()


def test_a_changed_byte_is_noticed_by_one_of_as_many_samples_as_the_stride() -> None:
    tensor = numbers(1000, 100)
    changed = tensor.clone()
    changed.view(torch.uint8)[777, 201] += 1
    noticed = [
        phase
        for phase in range(20, 24)
        if digests([tensor], Sample(4, phase)) != digests([changed], Sample(4, phase))
    ]
    assert noticed == [20]  # row 777 is in unit 4


def test_a_digester_follows_the_tensors_and_converts_values_first() -> None:
    tensors = {"experts": numbers(3, 10, 8), "matrix": numbers(20, 6)}
    pieces = [("experts", ((1, 2), (2, 9), (0, 8))), ("matrix", ((3, 17), (1, 4)))] * 2
    dtypes = [None, None, torch.bfloat16, torch.float32]
    digester = Digester(pieces, dtypes)
    for _ in range(2):
        values = [view_of(tensors[name], rect) for name, rect in pieces]
        values[2] = values[2].to(torch.bfloat16)
        expected = [sum_of_hashes(raw(value)) for value in values]
        assert digester.digests(tensors).tolist() == expected
        assert digester.digests(tensors, Sample(2, 1)).tolist() == expected
        tensors["experts"] += 1
        tensors["matrix"] = numbers(20, 6, seed=1)
    assert (
        Digester(pieces).digests(tensors, EVERYTHING)[:2] == digester.digests(tensors)[:2]
    ).all()
    assert Digester([]).digests(tensors).size == 0
