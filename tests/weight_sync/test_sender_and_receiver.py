"""Does an engine rank notice what did not arrive? A sender and a receiver in one process."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chatlearn_vllm.layouts import (
    CheckpointShards,
    MegatronShards,
    RolloutParallel,
    ShardedModel,
    TrainParallel,
    VLLMShards,
)
from chatlearn_vllm.weight_sync.digest import EVERYTHING, Sample
from chatlearn_vllm.weight_sync.links import LinkKind, Links, Place, colocated
from chatlearn_vllm.weight_sync.receiver import MAX_DESCRIBED, WeightReceiver
from chatlearn_vllm.weight_sync.remote import Link, LinkError
from chatlearn_vllm.weight_sync.sender import WeightSender
from tests.helpers.reference_shards import logical_tensors, megatron_tensors, tiny_shape

MODEL = tiny_shape(groups=4)
TRAIN = TrainParallel(2, tensor=2)
SOURCES = MegatronShards(MODEL, TRAIN)
WHOLE = CheckpointShards(MODEL, num_loaders=2, batch_elements=900)
"""Two engine ranks, each of which takes all tensors in several batches."""

Tensors = dict[str, torch.Tensor]


class Sync:
    """Both training ranks and one engine rank, after their first `open`."""

    def __init__(self, targets: ShardedModel, rank: int = 0, links: Links | None = None) -> None:
        self.targets, self.rank = targets, rank
        logical = {name: tensor.float() for name, tensor in logical_tensors(MODEL).items()}
        self.logical = logical
        self.held = [megatron_tensors(MODEL, logical, TRAIN, source) for source in range(2)]
        self.generation = 0
        links = links or colocated(2, targets.num_ranks, 1)
        self.senders = [
            WeightSender(source, lambda own=own: own, lambda: self.generation)
            for source, own in enumerate(self.held)
        ]
        self.planned = [sender.plan(SOURCES, targets, links) for sender in self.senders]
        self.receiver = WeightReceiver(rank)
        self.plan = self.receiver.plan(SOURCES, targets, links)
        self.open()

    def open(self) -> None:
        self.receiver.open(
            {source: self.senders[source].export() for source in self.plan.fingerprints}
        )

    def pull(self, batch: int, sample: Sample | None = EVERYTHING) -> Tensors:
        """What a batch has brought."""
        live = {
            layout.name: torch.full(layout.shape, torch.nan)
            for layout in self.targets.rank_layouts(self.rank)
            if self.targets.batch_of(layout.name) == batch
        }
        self.receiver.pull(live, batch, sample=sample)
        return live

    def pull_all(self, sample: Sample | None = EVERYTHING) -> Tensors:
        live: Tensors = {}
        for batch in range(self.targets.num_batches):
            live |= self.pull(batch, sample)
        return live

    def compare(self, sample: Sample | None = EVERYTHING):
        return self.receiver.compare(
            {source: self.senders[source].sent(sample) for source in self.plan.fingerprints}
        )


def test_the_caller_is_called_once_while_weights_are_copied_and_not_after() -> None:
    sync = Sync(VLLMShards(MODEL, RolloutParallel()))
    layouts = sync.targets.rank_layouts(0)
    live = {layout.name: torch.full(layout.shape, torch.nan) for layout in layouts}
    padding = []
    sync.receiver.pull(live, meanwhile=lambda: padding.append(live["lm_head.weight"][-1, 0].item()))
    assert [math.isnan(value) for value in padding] == [True]
    assert live["lm_head.weight"][-1, 0] == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_whole_tensors_come_in_batches_and_each_batch_is_compared(rank) -> None:
    sync = Sync(WHOLE, rank)
    assert WHOLE.num_batches > 3
    live = sync.pull_all()
    assert live.keys() == sync.logical.keys()
    assert all(torch.equal(live[name], tensor) for name, tensor in sync.logical.items())
    arrival = sync.compare()
    assert arrival.is_good and arrival.wrong == []
    assert arrival.num_bytes == 4 * sum(tensor.numel() for tensor in live.values())
    for source in (0, 1):
        assert sync.planned[source].get(rank) == sync.plan.fingerprints.get(source)


def test_a_batch_that_has_not_come_is_no_arrival() -> None:
    sync = Sync(WHOLE)
    for batch in range(WHOLE.num_batches - 1):
        sync.pull(batch)
    with pytest.raises(RuntimeError, match=r"^(\d+) of (\d+) batches of weights have arrived$"):
        sync.compare()
    sync.pull(WHOLE.num_batches - 1)
    assert sync.compare().is_good
    sync.open()  # the next sync: what came in the last one does not count
    with pytest.raises(RuntimeError, match="^0 of "):
        sync.compare()


def test_a_batch_out_of_turn_is_refused() -> None:
    sync = Sync(WHOLE)
    sync.pull(0)
    for batch in (0, 2):
        with pytest.raises(RuntimeError, match=f"^batch 1 of weights must come before {batch}$"):
            sync.pull(batch, sample=None)


def test_weights_that_change_in_one_batch_are_named() -> None:
    sync = Sync(WHOLE)
    sync.pull_all()
    for own in sync.held:
        own["decoder.layers.2.self_attention.linear_proj.weight"][3, 1] += 1
    arrival = sync.compare()
    assert not arrival.is_good and not arrival.has_moved
    assert arrival.num_wrong == 2  # a half from each training rank
    name = "model.layers.2.self_attn.o_proj.weight"
    assert arrival.wrong == [
        f"{name}[0:8, {8 * source}:{8 * source + 8}] of rollout rank 0, from "
        f"decoder.layers.2.self_attention.linear_proj.weight[0:8, 0:8] of training rank {source}"
        for source in (0, 1)
    ]


def test_all_wrong_rectangles_are_counted_and_some_described() -> None:
    sync = Sync(WHOLE)
    sync.pull_all()
    num_copies = sum(len(sent) for sent in digests_of(sync))
    for own in sync.held:
        for tensor in own.values():
            tensor += 1
    arrival = sync.compare()
    assert arrival.num_wrong == num_copies > MAX_DESCRIBED
    assert len(arrival.wrong) == MAX_DESCRIBED


def digests_of(sync: Sync):
    """Of the copies to the rank, by batch and training rank."""
    for sender in sync.senders:
        for batch in sender.sent().digests:
            yield batch.get(sync.rank, ())


def test_memory_that_moved_during_a_sync_is_noticed() -> None:
    sync = Sync(WHOLE)
    sync.pull_all()
    sync.generation += 1
    arrival = sync.compare()
    assert arrival.has_moved and arrival.num_wrong == 0
    assert not arrival.is_good


def test_a_sample_is_enough_for_a_comparison_and_without_digests_only_bytes_are_counted() -> None:
    sync = Sync(WHOLE)
    sync.pull_all(Sample(4, 1))
    assert sync.compare(Sample(4, 1)).is_good
    sync.open()
    sync.pull_all(sample=None)
    assert sync.senders[0].sent(None).digests == []
    arrival = sync.compare(sample=None)
    assert arrival.is_good
    assert arrival.num_bytes == 4 * sum(math.prod(t.shape) for t in sync.logical.values())


def link(sync: Sync, port: int, *, is_sender: bool, timeout_s: float = 30.0) -> Link:
    """One end between training rank 1 and the engine rank."""
    name = f"trainer 1 -> policy {sync.rank}"
    options = dict(is_sender=is_sender, device="cpu", timeout_s=timeout_s, bucket_bytes=512)
    return Link("127.0.0.1", port, name, **options)


def test_a_training_rank_behind_a_link_sends_what_each_batch_has_of_it() -> None:
    one_by_one = CheckpointShards(MODEL, num_loaders=2, batch_elements=1)
    sync = Sync(one_by_one)
    sender = sync.senders[1]
    port = sender.listen()
    sender.connect({0: link(sync, port, is_sender=True)})
    sync.receiver.connect({1: link(sync, port, is_sender=False)})
    sync.receiver.close()  # from here on training rank 1 shows nothing
    for _ in range(2):
        sync.receiver.open({0: sync.senders[0].export()})
        sync.held[1]["output_layer.weight"] += 1
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(sender.send)
            with sync.receiver.all_or_none():
                live = sync.pull_all()
            sending.result()
        rows = live["lm_head.weight"][50:]
        assert torch.equal(rows, sync.held[1]["output_layer.weight"][:50])
        assert all(not tensor.isnan().any() for tensor in live.values())
        assert sync.compare().is_good


def test_an_engine_rank_that_fails_does_not_leave_its_senders_waiting() -> None:
    sync = Sync(VLLMShards(MODEL, RolloutParallel()))
    sender = sync.senders[1]
    port = sender.listen()
    sender.connect({0: link(sync, port, is_sender=True)})
    sync.receiver.connect({1: link(sync, port, is_sender=False)})
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sender.send)
        with pytest.raises(OSError, match="disk"), sync.receiver.all_or_none():
            raise OSError("disk full")
        with pytest.raises(LinkError, match="the other end gave up: OSError: disk full"):
            sending.result()
    assert time.monotonic() - start < 10


def test_a_training_rank_that_fails_does_not_leave_engine_ranks_waiting() -> None:
    targets = VLLMShards(MODEL, RolloutParallel(replicas=2))
    links = Links([Place("train")] * 2, [Place("rollout")] * 2, 1)
    syncs = [Sync(targets, rank, links) for rank in (0, 1)]
    sender = syncs[0].senders[1]
    port = sender.listen()
    ends = {sync.rank: link(sync, port, is_sender=True) for sync in syncs}
    sender.connect(ends)
    ends[0].give_up("no disk")  # so the sender never comes to the other one
    syncs[1].receiver.connect({1: link(syncs[1], port, is_sender=False)})
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(syncs[1].pull_all)
        with pytest.raises(LinkError, match="trainer 1 -> policy 0"):
            sender.send()
        with pytest.raises(LinkError, match="trainer 1 -> policy 1.*the other end gave up"):
            pulling.result()
    assert time.monotonic() - start < 10


def test_padding_is_zeroed_in_every_sync() -> None:
    sync = Sync(VLLMShards(MODEL, RolloutParallel(replicas=2)))
    live = sync.pull_all()
    assert sync.compare().is_good
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(live[name][:100], sync.logical[name])
        assert live[name].shape == (128, 8) and not live[name][100:].any()


def test_a_rank_for_which_another_loads_waits_for_nothing() -> None:
    for_two = CheckpointShards(MODEL, num_loaders=1, batch_elements=900, ranks_per_loader=2)
    sync = Sync(for_two, rank=1, links=colocated(2, 2, 2))
    assert sync.plan.fingerprints == {}
    arrival = sync.compare()
    assert arrival.is_good and arrival.num_bytes == 0


def test_a_plan_says_how_much_comes_over_which_link() -> None:
    trainers = [Place("here", "GPU 0"), Place("there", "GPU 1")]
    reader = Place("here", "GPU 0")
    targets = VLLMShards(MODEL, RolloutParallel())
    own = sum(block.num_elements for param in targets.rank_layouts(0) for block in param.blocks)
    apart = Sync(targets, links=Links(trainers, [reader], 1)).plan.num_elements
    assert apart[LinkKind.HOST] == 0
    assert apart[LinkKind.DEVICE] + apart[LinkKind.NETWORK] == own
    norms = 8 * (2 * MODEL.num_layers + 1)  # which both training ranks hold
    assert apart[LinkKind.DEVICE] - apart[LinkKind.NETWORK] == norms
    together = Sync(targets).plan.num_elements
    assert together == {LinkKind.DEVICE: own, LinkKind.HOST: 0, LinkKind.NETWORK: 0}
