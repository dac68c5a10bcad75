"""Do planned copies arrive over links, several at once, and does a broken link say so?"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from chatlearn_vllm.layouts.blocks import whole
from chatlearn_vllm.weight_sync.links import colocated
from chatlearn_vllm.weight_sync.planner import Copy, plan_reader, plan_sender
from chatlearn_vllm.weight_sync.remote import Link, LinkError, all_or_none
from chatlearn_vllm.weight_sync.schedule import schedule
from tests.helpers.network import NoNamespacesError, two_hosts
from tests.helpers.random_shards import assemble, random_shards, random_tensors
from tests.helpers.ranks import Ranks, free_port


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(5)
    yield ranks
    ranks.close()


def link_ends(timeout_s: float = 30.0, **options) -> tuple[Link, Link]:
    """Both ends of a link, for threads of this process or for processes of their own."""
    port = free_port()
    options = {"device": "cpu", "timeout_s": timeout_s, **options}
    name = "trainer 3 -> policy 1"
    return (
        Link("127.0.0.1", port, name, is_sender=True, **options),
        Link("127.0.0.1", port, name, is_sender=False, **options),
    )


def copy_whole(name: str, tensor: torch.Tensor) -> Copy:
    rect = whole(tuple(tensor.shape))
    return Copy(0, name, rect, name, rect)


def sync_over_links(
    seed: int, num_senders: int, num_readers: int, bucket_bytes: int, dtypes: tuple, ports: list
) -> list[str]:
    """One end of all links: training ranks first, then rollout ranks. Wrong or left-out targets."""
    rank = int(os.environ["RANK"])
    if rank >= num_senders + num_readers:
        return []
    is_sender = rank < num_senders
    rank -= 0 if is_sender else num_senders
    # Both sides have a world of their own already, as trainers and rollout replicas do.
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{ports[-1 if is_sender else -2]}",
        rank=rank,
        world_size=num_senders if is_sender else num_readers,
    )
    logical = random_tensors(seed)
    sources = random_shards(logical, num_senders, random.Random(seed + 1))
    targets = random_shards(logical, num_readers, random.Random(seed + 2))
    links = colocated(num_senders, num_readers, num_readers)
    plans = [plan_sender(sender, sources, targets, links) for sender in range(num_senders)]
    rounds = schedule([(sender, reader) for sender, own in enumerate(plans) for reader in own])
    peers = [pair[is_sender] for pairs in rounds for pair in pairs if pair[not is_sender] == rank]
    ends = {
        peer: Link(
            "127.0.0.1", ports[rank if is_sender else peer],
            f"trainer {rank} -> policy {peer}" if is_sender else f"trainer {peer} -> policy {rank}",
            is_sender=is_sender, device="cpu", timeout_s=60, bucket_bytes=bucket_bytes,
        )
        for peer in peers
    }  # fmt: skip
    wrong = []
    for version in range(3):
        now = {name: value + version for name, value in logical.items()}
        if is_sender:
            tensors = assemble(sources.rank_layouts(rank), now, dtypes[0])
            for peer in peers:
                ends[peer].send(plans[rank][peer], tensors)
        else:
            layouts = targets.rank_layouts(rank)
            expected = assemble(layouts, now, dtypes[0])
            live = {n: torch.full_like(t, -1, dtype=dtypes[1]) for n, t in expected.items()}
            copies = plan_reader(rank, layouts, sources, links).by_source()
            num_bytes = sum(ends[peer].receive(copies[peer], live) for peer in peers)
            assert num_bytes == sum(t.nbytes for t in live.values())
            wrong += [n for n, t in live.items() if not torch.equal(t, expected[n].to(t.dtype))]
        if version == 1:  # the next transfer opens them again
            for link in ends.values():
                link.close()
    for link in ends.values():
        link.close()
    count = torch.ones(1)
    dist.all_reduce(count)
    assert count.item() == dist.get_world_size()
    dist.destroy_process_group()
    return wrong


@pytest.mark.parametrize("bucket_bytes", [32, 1000, 2**20])
@pytest.mark.parametrize("num_senders, num_readers", [(1, 1), (3, 2), (2, 3)])
def test_any_layouts_arrive(ranks, num_senders, num_readers, bucket_bytes) -> None:
    seed = 100 * num_senders + 10 * num_readers + bucket_bytes
    ports = [free_port() for _ in range(num_senders + 2)]
    dtypes = (torch.float32, torch.float32)
    wrong = ranks.run(sync_over_links, seed, num_senders, num_readers, bucket_bytes, dtypes, ports)
    assert wrong == [[]] * 5


def test_values_are_converted_where_they_arrive(ranks) -> None:
    ports = [free_port() for _ in range(4)]
    dtypes = (torch.float32, torch.bfloat16)
    assert ranks.run(sync_over_links, 5, 2, 2, 300, dtypes, ports) == [[]] * 5


def test_a_pair_with_different_plans_is_refused_at_both_ends() -> None:
    sender, receiver = link_ends()
    tensor = torch.ones(4, 4)
    sent = Copy(0, "w", ((0, 2), (0, 4)), "w", ((0, 2), (0, 4)))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sender.send, [sent], {"w": tensor})
        with pytest.raises(LinkError, match=r"trainer 3 -> policy 1, receiver.*the same copies"):
            receiver.receive([copy_whole("w", tensor)], {"w": torch.zeros(4, 4)})
        with pytest.raises(LinkError, match=r"trainer 3 -> policy 1, sender.*the same copies"):
            sending.result()


def test_an_end_that_never_comes_is_reported_by_either_end() -> None:
    tensor = torch.ones(2)
    for is_sender in (True, False):
        sender, receiver = link_ends(timeout_s=1.0)
        start = time.monotonic()
        with pytest.raises(LinkError, match=r"trainer 3 -> policy 1, .*, meeting the other end: "):
            if is_sender:
                sender.send([copy_whole("w", tensor)], {"w": tensor})
            else:
                receiver.receive([copy_whole("w", tensor)], {"w": tensor})
        assert time.monotonic() - start < 10


def test_an_end_that_stops_half_way_ends_the_transfer_at_both_ends() -> None:
    sender, receiver = link_ends(timeout_s=60.0, bucket_bytes=4096)
    tensors = {"a": torch.ones(1024), "b": torch.ones(1024)}
    copies = [copy_whole(name, tensor) for name, tensor in tensors.items()]
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sender.send, copies, tensors)
        with pytest.raises(KeyError, match="b"):
            receiver.receive(copies, {"a": torch.zeros(1024)})
        with pytest.raises(LinkError, match="trainer 3 -> policy 1, sender, "):
            sending.result(timeout=10)
    with pytest.raises(LinkError, match="make a new link"):
        sender.send(copies, tensors)


class StallingTargets(dict):
    """Parameters of a rank that stops for a while when it is about to write the second one."""

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "b":
            time.sleep(3.0)
        return super().__getitem__(name)


def test_an_end_that_stalls_is_reported_after_the_timeout() -> None:
    sender, receiver = link_ends(timeout_s=1.0, bucket_bytes=4096)
    tensors = {name: torch.ones(1024) for name in "abcdef"}
    copies = [copy_whole(name, tensor) for name, tensor in tensors.items()]
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receiver.receive, copies, StallingTargets(tensors))
        with pytest.raises(LinkError, match="sender, sending bucket . of 6: .*Timed out"):
            sender.send(copies, tensors)
        with pytest.raises(LinkError, match="receiver, receiving bucket . of 6: "):
            receiving.result()


@pytest.mark.parametrize("num_transfers", [0, 1])
def test_an_end_that_was_given_up_fails_at_once_with_the_reason(num_transfers) -> None:
    tensors = {"w": torch.ones(100)}
    copies = [copy_whole("w", tensors["w"])]
    for quitter in ("sender", "receiver"):
        sender, receiver = link_ends(timeout_s=100.0)
        waiting, giving_up = (
            (receiver.receive, sender) if quitter == "sender" else (sender.send, receiver)
        )
        start = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            for _ in range(num_transfers):
                receiving = pool.submit(receiver.receive, copies, tensors)
                sender.send(copies, tensors)
                receiving.result()
            failing = pool.submit(waiting, copies, tensors)
            with pytest.raises(OSError, match="disk"), all_or_none([giving_up]):
                raise OSError("disk full")
            with pytest.raises(LinkError, match="meeting the other end: .* OSError: disk full"):
                failing.result()
        assert time.monotonic() - start < 10
        with pytest.raises(LinkError, match="make a new link"):
            giving_up.send(copies, tensors)


def receive_forever(receiver: Link, copies: list[Copy], targets: dict) -> None:
    while True:
        receiver.receive(copies, targets)


def send_forever(sender: Link, copies: list[Copy], tensors: dict) -> None:
    while True:
        sender.send(copies, tensors)


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_killed_peer_is_reported_at_once(victim) -> None:
    sender, receiver = link_ends(timeout_s=200.0, bucket_bytes=2**16)
    tensors = {"w": torch.ones(2**20)}
    copies = [copy_whole("w", tensors["w"])]
    here, there, target, survivor = (
        (receiver.receive, sender, send_forever, "receiver")
        if victim == "sender"
        else (sender.send, receiver, receive_forever, "sender")
    )
    process = multiprocessing.get_context("spawn").Process(
        target=target, args=(there, copies, tensors)
    )
    process.start()
    here(copies, tensors)  # both are up and running
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(lambda: [here(copies, tensors) for _ in range(10**6)])
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(LinkError, match=f"trainer 3 -> policy 1, {survivor}, "):
            working.result(timeout=30)
    assert time.monotonic() - start < 10
    process.join()


def work_one_end(is_sender: bool, host: str, port: int) -> None:
    """What each host runs: a link of 4 MB, used twice."""
    tensors = random_tensors(seed=1) | {"w": torch.arange(1e6).view(1000, 1000)}
    copies = [copy_whole(name, tensor) for name, tensor in tensors.items()]
    link = Link(
        host, port, "trainer 0 -> policy 0",
        is_sender=is_sender, device="cpu", timeout_s=60, bucket_bytes=2**20,
    )  # fmt: skip
    for _ in range(2):
        if is_sender:
            link.send(copies, tensors)
        else:
            targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
            link.receive(copies, targets)
            assert all(torch.equal(targets[name], tensor) for name, tensor in tensors.items())
    link.close()


def exit_codes_of_both_ends(start_trainer, start_policy, address: str, port: int) -> list[int]:
    """Run both ends of a link; the functions start a program where its end is."""
    code = "from tests.weight_sync.test_remote import work_one_end; work_one_end"
    ends = [
        start([sys.executable, "-c", f"{code}({is_sender}, {address!r}, {port})"])
        for start, is_sender in ((start_trainer, True), (start_policy, False))
    ]
    return [end.wait(timeout=120) for end in ends]


def test_weights_travel_between_two_hosts() -> None:
    try:
        with two_hosts() as (trainer, policy):
            ends = (trainer.start, policy.start)
            assert exit_codes_of_both_ends(*ends, trainer.address, 29400) == [0, 0]
            assert 8e6 < policy.received_bytes() < 9e6
            assert trainer.received_bytes() < 1e6
    except NoNamespacesError as reason:
        warnings.warn(f"one host has to do, over its loopback address: {reason}", stacklevel=1)
        ends = (subprocess.Popen, subprocess.Popen)
        assert exit_codes_of_both_ends(*ends, "127.0.0.1", free_port()) == [0, 0]
