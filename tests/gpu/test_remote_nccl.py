"""Do links carry weights between GPUs over NCCL, with or without peer access, and fail cleanly?"""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from chatlearn_vllm.weight_sync.planner import Copy
from chatlearn_vllm.weight_sync.remote import Link, LinkError
from tests.helpers.ranks import Ranks, free_port
from tests.weight_sync.test_remote import StallingTargets, copy_whole

pytestmark = pytest.mark.gpu

BUCKET = 8 * 2**20
NETWORK_ONLY = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
}
"""NCCL's settings that leave it what it has between two hosts: sockets."""


def weights(device: str) -> dict[str, torch.Tensor]:
    """72 MB in three dtypes; parameters larger and smaller than a bucket, one in host memory."""
    g = torch.Generator().manual_seed(1)
    tensors = {f"small {i}": torch.rand(300, 7, generator=g) for i in range(40)}
    tensors["large"] = torch.rand(4096, 4096, generator=g).bfloat16()
    tensors["double"] = torch.rand(1000, 999, generator=g).double()
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    offloaded = torch.rand(2048, 4096, generator=g)
    return tensors | {"offloaded": offloaded if device == "cpu" else offloaded.pin_memory()}


def column_copies(tensors: dict[str, torch.Tensor]) -> list[Copy]:
    """All weights, each in two column blocks that change places."""
    copies = []
    for name, tensor in tensors.items():
        rows, columns = tensor.shape
        middle = columns // 2
        left, right = ((0, rows), (0, middle)), ((0, rows), (middle, columns))
        moved = ((0, rows), (columns - middle, columns)), ((0, rows), (0, columns - middle))
        copies += [Copy(0, name, left, name, moved[0]), Copy(0, name, right, name, moved[1])]
    return copies


def change_places(tensor: torch.Tensor) -> torch.Tensor:
    """What `column_copies` make of a tensor."""
    return tensor.roll(-(tensor.shape[1] // 2), dims=1)


def sync_across(pairs: dict[int, int], port: int, environment: dict[str, str]) -> None:
    """One end of a link: even ranks send, odd ranks receive; GPU by pair of ranks."""
    os.environ.update(environment)
    rank = int(os.environ["RANK"])
    is_sender = rank % 2 == 0
    device = torch.device("cuda", rank // 2)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    peer = pairs[rank]
    sender, receiver = (rank, peer) if is_sender else (peer, rank)
    link = Link(
        "127.0.0.1", port + sender, f"trainer {sender} -> policy {receiver}",
        is_sender=is_sender, device=device, timeout_s=120, bucket_bytes=BUCKET,
    )  # fmt: skip
    on_host = weights("cpu")
    copies = column_copies(on_host)
    mine = (
        weights("cuda")
        if is_sender
        else {n: torch.zeros_like(t, device=device) for n, t in on_host.items()}
    )
    for version in range(3):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if is_sender:
            link.send(copies, mine)
            for tensor in mine.values():
                tensor += 1
        else:
            num_bytes = link.receive(copies, mine)
            assert num_bytes == sum(tensor.nbytes for tensor in mine.values())
            for name, tensor in on_host.items():
                for _ in range(version):
                    tensor = tensor + 1
                assert torch.equal(mine[name].cpu(), change_places(tensor)), (version, name)
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= 2 * BUCKET + 4096, extra
        if version == 1:
            link.close()
    link.close()
    one = torch.ones(1, device=device)
    dist.all_reduce(one)
    assert one.item() == 1
    dist.destroy_process_group()


def test_a_rank_without_gpu_gets_what_a_gpu_holds() -> None:
    on_host = weights("cpu")
    copies = column_copies(on_host)
    targets = {name: torch.zeros_like(tensor) for name, tensor in on_host.items()}
    port = free_port()
    sender, receiver = (
        Link(
            "127.0.0.1", port, "trainer 0 -> policy 0", is_sender=is_sender, device="cpu",
            timeout_s=60, bucket_bytes=BUCKET,
        )
        for is_sender in (True, False)
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sender.send, copies, weights("cuda"))
        receiver.receive(copies, targets)
        sending.result(60)
    for name, tensor in on_host.items():
        assert torch.equal(targets[name], change_places(tensor)), name
    sender.close()
    receiver.close()


def run_ranks(world_size: int, function, *args) -> list:
    ranks = Ranks(world_size)
    try:
        return ranks.run(function, *args)
    finally:
        ranks.close()


@pytest.mark.parametrize("environment", [{}, NETWORK_ONLY], ids=["peer access", "sockets"])
def test_weights_arrive_on_another_gpu(two_gpus, environment) -> None:
    run_ranks(4, sync_across, {0: 3, 3: 0, 2: 1, 1: 2}, free_port(), environment)


def measure(port: int, environment: dict[str, str]) -> tuple[float, float]:
    """Best seconds for 2 GiB over a link, and as one tensor through the same group."""
    os.environ.update(environment)
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    shape, num_tensors = (4096, 4096), 64
    tensors = {
        f"w{i}": torch.full(shape, float(rank), dtype=torch.bfloat16, device="cuda")
        for i in range(num_tensors)
    }
    copies = column_copies(tensors)
    link = Link("127.0.0.1", port, "trainer 0 -> policy 0", is_sender=rank == 0, device="cuda")
    packed, plain = [], []
    for _ in range(4):
        start = time.perf_counter()
        link.send(copies, tensors) if rank == 0 else link.receive(copies, tensors)
        packed.append(time.perf_counter() - start)
    whole = torch.empty(num_tensors * tensors["w0"].nbytes, dtype=torch.uint8, device="cuda")
    for _ in range(4):
        start = time.perf_counter()
        group = link._group
        link._wait(group.send([whole], 1, 0) if rank == 0 else group.recv([whole], 0, 0))
        torch.cuda.synchronize()
        plain.append(time.perf_counter() - start)
    link.close()
    return min(packed), min(plain)


def test_packing_costs_less_than_the_transfer(two_gpus) -> None:
    seconds = run_ranks(2, measure, free_port(), {})
    for packed, plain in seconds:
        print(f"2 GiB: link {2 / packed:.1f} GiB/s, one tensor {2 / plain:.1f} GiB/s")
    assert all(packed < 2 * plain for packed, plain in seconds)


def stall(port: int) -> str:
    """A receiver that stalls for longer than the sender waits; the sender's failure."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    link = Link(
        "127.0.0.1", port, "trainer 0 -> policy 0",
        is_sender=rank == 0, device="cuda", timeout_s=20.0, bucket_bytes=4096,
    )  # fmt: skip
    tensors = {name: torch.full((1024,), 1.0 - rank, device="cuda") for name in "abcdef"}
    copies = [copy_whole(name, tensor) for name, tensor in tensors.items()]
    link.send(copies, tensors) if rank == 0 else link.receive(copies, tensors)  # connects
    link._timeout_s = 1.0
    failure = ""
    try:
        link.send(copies, tensors) if rank == 0 else link.receive(copies, StallingTargets(tensors))
    except LinkError as error:
        failure = str(error)
    assert torch.ones(2, device="cuda").sum().item() == 2.0  # the GPU is still usable
    return failure


def test_a_stalled_end_is_reported(two_gpus) -> None:
    of_sender, _ = run_ranks(2, stall, free_port())
    assert "trainer 0 -> policy 0, sender, " in of_sender
    assert "no progress in timeout_s=1" in of_sender


def receive_until_killed(port: int) -> None:
    torch.cuda.set_device(1)
    link = Link(
        "127.0.0.1", port, "trainer 0 -> policy 0",
        is_sender=False, device="cuda", bucket_bytes=BUCKET,
    )  # fmt: skip
    targets = {"w": torch.zeros(2**26, device="cuda")}
    while True:
        link.receive([copy_whole("w", targets["w"])], targets)


def test_a_killed_receiver_is_reported_and_ends_no_other_process(two_gpus) -> None:
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=receive_until_killed, args=(port,)
    )
    process.start()
    link = Link(
        "127.0.0.1", port, "trainer 0 -> policy 0",
        is_sender=True, device="cuda:0", timeout_s=60.0, bucket_bytes=BUCKET,
    )  # fmt: skip
    tensors = {"w": torch.ones(2**26, device="cuda:0")}
    copies = [copy_whole("w", tensors["w"])]
    link.send(copies, tensors)
    link._timeout_s = 5.0
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(lambda: [link.send(copies, tensors) for _ in range(10**6)])
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(LinkError, match="trainer 0 -> policy 0, sender, "):
            working.result(timeout=90)
    process.join()
    assert torch.ones(2, device="cuda:0").sum().item() == 2.0  # the GPU is still usable
