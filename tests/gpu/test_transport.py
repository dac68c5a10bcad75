"""Do fused copies and digests do on GPUs what plain torch does, between processes and devices?"""

import multiprocessing

import pytest
import torch

from chatlearn_vllm.layouts.blocks import Rect
from chatlearn_vllm.weight_sync.digest import Sample, digests
from chatlearn_vllm.weight_sync.pieces import view_of
from chatlearn_vllm.weight_sync.planner import Copy
from chatlearn_vllm.weight_sync.transport import OpenedExport, Puller, export_tensors
from chatlearn_vllm.weight_sync.verify import Digester

pytestmark = pytest.mark.gpu

SHAPES = {
    "matrix": (1000, 512), "tall": (70000, 34), "wide": (3, 300000), "vector": (777,),
    "experts": (5, 64, 128), "one": (1, 2),
}  # fmt: skip
PIECES: list[tuple[str, Rect]] = [
    ("matrix", ((0, 1000), (0, 512))),
    ("matrix", ((3, 900), (8, 512))),
    ("tall", ((11, 69999), (2, 34))),
    ("wide", ((1, 3), (100, 299998))),
    ("vector", ((1, 777),)),
    ("experts", ((2, 3), (5, 60), (0, 128))),
    ("experts", ((4, 5), (0, 64), (6, 18))),
    ("one", ((0, 1), (0, 2))),
]


def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
        for name, shape in SHAPES.items()
    }


def show(device: str, dtype: torch.dtype, connection) -> None:
    """A training process: shows its tensors until it is told to end."""
    torch.cuda.set_device(device)
    tensors = make(device, dtype, seed=0)
    connection.send(export_tensors(tensors, generation=1))
    connection.recv()


@pytest.fixture(params=["cuda:0", "cuda:1"])
def source_device(request) -> str:
    if int(request.param[-1]) >= torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    return request.param


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
    ids=["float32", "bfloat16", "float32 to bfloat16"],
)
def test_rectangles_of_another_process_arrive_and_nothing_else_changes(
    source_device, sent, kept
) -> None:
    torch.cuda.set_device(0)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=show, args=(source_device, sent, theirs))
    process.start()
    opened = OpenedExport(ours.recv())
    try:
        expected = make("cuda:0", kept, seed=1)
        targets = {name: tensor.clone() for name, tensor in expected.items()}
        wanted = make("cpu", sent, seed=0)
        pieces = PIECES if sent is kept else PIECES[:4]
        even = [piece for piece in pieces if sent.itemsize == 4 or piece[0] != "vector"]
        for name, rect in even:
            view_of(expected[name], rect).copy_(view_of(wanted[name], rect))
        puller = Puller([Copy(0, name, rect, name, rect) for name, rect in even])
        for _ in range(2):
            puller.pull({0: opened}, targets)
        for name in SHAPES:
            assert torch.equal(targets[name], expected[name]), name
        on_host = [view_of(wanted[name], rect).to(kept) for name, rect in even]
        got = Digester(even).digests(targets)
        assert (got == digests(on_host)).all()
        view_of(targets[even[1][0]], even[1][1])[5, 7] += 1
        changed = Digester(even).digests(targets) != got
        assert changed.tolist() == [True, True, *[False] * (len(even) - 2)]
    finally:
        opened.close()
        ours.send("end")
        process.join()


def test_a_digest_of_values_to_be_converted_is_that_of_the_converted_values() -> None:
    tensors = make("cuda:0", torch.float32, seed=0)
    dtypes = [torch.bfloat16, None] * 4
    got = Digester(PIECES, dtypes).digests(tensors)
    views = [view_of(tensors[name], rect) for name, rect in PIECES]
    expected = [view.to(d) if d else view for view, d in zip(views, dtypes, strict=True)]
    assert (got == digests(expected)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampled_digests_are_those_of_the_cpu(dtype) -> None:
    tensors = make("cuda:0", dtype, seed=0) | {
        "low rank": torch.randn(40000, 6, device="cuda:0").to(dtype),
        "column": torch.randn(64, 1, device="cuda:0").to(dtype),
    }
    # Rows that are no multiple of 16 bytes, in rectangles that are; rows of less than a word.
    pieces = [
        *PIECES, ("tall", ((0, 70000), (0, 34))), ("low rank", ((0, 40000), (0, 6))),
        ("column", ((0, 64), (0, 1))),
    ]  # fmt: skip
    pieces = [piece for piece in pieces if dtype.itemsize == 4 or piece[0] != "vector"]
    views = [view_of(tensors[name], rect).cpu() for name, rect in pieces]
    digester = Digester(pieces)
    for sample in (Sample(2, 0), Sample(2, 1), Sample(2, 5), Sample(16, 0), Sample(16, 27)):
        assert (digester.digests(tensors, sample) == digests(views, sample)).all(), sample
