"""What does a sync do with wrong weights, between hosts, and after a failure? On real Ray."""

import os
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from ray.cluster_utils import Cluster as RayCluster

from chatlearn_vllm.layouts import Block, ListedShards, ParamLayout
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.cluster import Cluster
from chatlearn_vllm.runtime.errors import RankDiedError, RankError
from chatlearn_vllm.runtime.weight_synchronizer import WeightMismatchError, WeightSynchronizer
from chatlearn_vllm.runtime.worker_group import gather
from tests.helpers.toy_modules import LINK_TIMEOUT_S, VOCABULARY, ToyPolicy, ToyTrainer, write_job
from tests.runtime.conftest import left_after, rank_processes


class Policy(ToyPolicy):
    """Replicas that hold all scores."""

    is_broken = False

    def break_next_import(self):
        self.is_broken = True

    def import_weights(self, *args):
        if not self.is_broken:
            return super().import_weights(*args)
        self.is_broken, whole = False, self.scores
        self.scores = torch.empty(0)  # what arrives finds no room
        try:
            return super().import_weights(*args)
        finally:
            self.scores = whole

    def state(self):
        return self.scores.tolist(), self.version


class SplitTrainer(ToyTrainer):
    """Each rank holds a part of the scores."""

    changes_late = False

    def model_setup(self):
        super().model_setup()
        self.scores = torch.full((VOCABULARY // self.world_size,), float(self.rank))

    def weight_shards(self):
        width = VOCABULARY // self.world_size
        return ListedShards(
            {
                rank: [
                    ParamLayout(
                        "scores",
                        (width,),
                        (Block("scores", ((rank * width, (rank + 1) * width),), ((0, width),)),),
                    )
                ]
                for rank in range(self.world_size)
            }
        )

    def change_weights(self):
        self.scores += 10

    def move_weights(self):
        self.num_moves += 1

    def change_weights_late(self):
        """In the next sync, after they were read."""
        self.changes_late = True

    def sent_weights(self, sample):
        if self.changes_late:
            self.changes_late = False
            self.scores[1] += 1
        return super().sent_weights(sample)


class OnGPU:
    """Says that its weights are on a GPU, whose memory is opened once and then read in place.

    Here what was opened stays as it was then, like memory that the weights have left.
    """

    def weight_gpu(self):
        return "GPU-0", frozenset()


class TrainerOnGPU(OnGPU, SplitTrainer):
    pass


class PolicyOnGPU(OnGPU, Policy):
    pass


class Mortal:
    """Its process is killed when it comes to a phase of the sync, once it was told which."""

    last_phase = None

    def end_in(self, phase):
        self.last_phase = phase

    def reach(self, phase):
        if self.last_phase == phase:
            time.sleep(0.5)  # until what it has answered before is on its way
            os.kill(os.getpid(), signal.SIGKILL)


class MortalTrainer(Mortal, SplitTrainer):
    def export_weights(self):
        self.reach("export_weights")
        return super().export_weights()

    def send_weights(self):
        self.reach("send_weights")
        super().send_weights()

    def sent_weights(self, sample):
        self.reach("sent_weights")
        return super().sent_weights(sample)


class MortalPolicy(Mortal, Policy):
    def import_weights(self, *args):
        super().import_weights(*args)
        self.reach("import_weights")  # all is copied, and nobody knows whether rightly

    def finish_weight_sync(self, *args):
        arrival = super().finish_weight_sync(*args)
        self.reach("finish_weight_sync")  # READY, and nobody knows
        return arrival


class TrainerThatDiesPlanning(SplitTrainer):
    def plan_weight_sync(self, *args):
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().plan_weight_sync(*args)


class PolicyThatDiesPlanning(Policy):
    def plan_weight_sync(self, *args):
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def ready_to_sync(directory, *overrides, classes=(SplitTrainer, Policy)):
    """A trainer and a policy that are not colocated, and what copies between them."""
    session.init(str(write_job(directory)), ["runtime.colocation=[]", *overrides])
    trainer, policy = classes[0]("policy_trainer"), classes[1]("policy")
    cluster = Cluster(policy.job, [trainer, policy])
    try:
        groups = cluster.start()
        for group in groups.values():
            group.call("init")
            group.call("model_setup")
        sync = WeightSynchronizer(groups["policy_trainer"], groups["policy"])
        sync.setup()
        yield groups["policy_trainer"], groups["policy"], sync
    finally:
        cluster.stop()


def nodes(group):
    return [rank.location.node_id for rank in group.ranks]


def test_weights_that_change_under_a_sync_are_reported_and_no_engine_gets_ready(
    existing_cluster, tmp_path
):
    with ready_to_sync(tmp_path) as (trainer, policy, sync):
        assert sync.sync().version == 1
        assert policy.call("state") == [([0.0] * 4 + [1.0] * 4, 1)] * 2
        gather([trainer.start_on(1, "change_weights_late")])

        with pytest.raises(WeightMismatchError) as caught:
            sync.sync()

        assert str(caught.value).splitlines() == [
            "weight sync to version 2: 2 copies do not hold what was sent; the engines are STALE:",
            "  scores[4:8] of rollout rank 0, from scores[0:4] of training rank 1",
            "  scores[4:8] of rollout rank 1, from scores[0:4] of training rank 1",
        ]
        assert [version for _, version in policy.call("state")] == [None, None]
        assert sync.sync().version == 3
        assert policy.call("state") == [([0.0] * 4 + [1.0, 2.0, 1.0, 1.0], 3)] * 2
    assert left_after(30, rank_processes, existing_cluster) == {}


def test_memory_is_opened_once_and_again_where_weights_have_moved(existing_cluster, tmp_path):
    with ready_to_sync(tmp_path, classes=(TrainerOnGPU, PolicyOnGPU)) as (trainer, policy, sync):
        sync.sync()
        sync.sync()
        trainer.call("change_weights")
        with pytest.raises(WeightMismatchError, match="4 copies do not hold what was sent"):
            sync.sync()  # reads what was opened first
        sync.sync()
        assert policy.call("state") == [([10.0] * 4 + [11.0] * 4, 4)] * 2

        trainer.call("change_weights")
        gather([trainer.start_on(1, "move_weights")])

        sync.sync()
        assert policy.call("state") == [([20.0] * 4 + [21.0] * 4, 5)] * 2


def check_death(directory, name, phase):
    """A rank dies in a phase of the second sync; what its neighbours are left with.

    Calls wait at each rank one behind the other, and Ray may report the death with any of them.
    """
    with ready_to_sync(directory, classes=(MortalTrainer, MortalPolicy)) as (trainer, policy, sync):
        sync.sync()
        trainer.call("change_weights")
        dying = trainer if name == "policy_trainer" else policy
        gather([dying.start_on(1, "end_in", phase)])

        with pytest.raises(RankDiedError, match=rf"\[{name}, .*\] process .* died"):
            sync.sync()

        survivors = [0] if dying is policy else [0, 1]
        return gather([policy.start_on(rank, "state") for rank in survivors])


@pytest.mark.parametrize(
    "name, phase",
    [
        ("policy_trainer", "sent_weights"),
        ("policy", "import_weights"),
        ("policy", "finish_weight_sync"),
    ],
)
def test_no_engine_is_ready_after_a_rank_died_in_a_sync(existing_cluster, tmp_path, name, phase):
    for scores, version in check_death(tmp_path, name, phase):
        assert version is None
        assert scores == [10.0] * 4 + [11.0] * 4
    assert left_after(30, rank_processes, existing_cluster) == {}


def test_engines_keep_what_they_had_if_a_trainer_dies_before_it_shows_its_weights(
    existing_cluster, tmp_path
):
    expected = [0.0] * 4 + [1.0] * 4
    assert check_death(tmp_path, "policy_trainer", "export_weights") == [(expected, 1)] * 2


@pytest.mark.parametrize(
    "name, classes",
    [
        ("policy_trainer", (TrainerThatDiesPlanning, Policy)),
        ("policy", (SplitTrainer, PolicyThatDiesPlanning)),
    ],
)
def test_a_rank_that_dies_while_it_plans_is_named(existing_cluster, tmp_path, name, classes):
    died = rf"\[{name}, .*\] process .* died during plan_weight_sync"
    with pytest.raises(RankDiedError, match=died), ready_to_sync(tmp_path, classes=classes):
        pass
    assert left_after(30, rank_processes, existing_cluster) == {}


@pytest.fixture(scope="module")
def two_nodes():
    """Two Ray nodes of two CPUs, for Ray two hosts; returns the address."""
    cluster = RayCluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2, include_dashboard=False)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def test_weights_reach_replicas_on_this_and_on_another_host(two_nodes, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)
    sizes = ["models.policy.num_gpu=3", "models.policy_trainer.num_gpu=1"]
    with ready_to_sync(tmp_path, *sizes, "runtime.sample_per_episode=48") as (
        trainer,
        policy,
        sync,
    ):
        assert [node in nodes(trainer) for node in nodes(policy)] == [False, False, True]
        for version in (1, 2, 3):
            assert sync.sync().num_bytes == 3 * 4 * VOCABULARY
            expected = [10.0 * (version - 1)] * VOCABULARY
            assert policy.call("state") == [(expected, version)] * 3
            trainer.call("change_weights")


def test_no_engine_is_ready_after_a_trainer_died_while_it_sent(two_nodes, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)
    start = time.monotonic()
    states = check_death(tmp_path, "policy_trainer", "send_weights")
    assert [version for _, version in states] == [None, None]
    assert time.monotonic() - start < LINK_TIMEOUT_S / 2


def test_a_sync_between_hosts_that_failed_is_repeated_over_new_links_without_a_wait(
    two_nodes, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)
    with ready_to_sync(tmp_path) as (trainer, policy, sync):
        assert not set(nodes(trainer)) & set(nodes(policy))
        sync.sync()
        trainer.call("change_weights")
        gather([policy.start_on(1, "break_next_import")])
        start = time.monotonic()

        with pytest.raises(RankError, match=r"link policy_trainer \d -> policy \d, "):
            sync.sync()

        assert [version for _, version in policy.call("state")] == [None, None]
        for version in (3, 4):
            assert sync.sync().version == version
            assert policy.call("state") == [([10.0] * 4 + [11.0] * 4, version)] * 2
        assert time.monotonic() - start < LINK_TIMEOUT_S / 2  # nobody waited for a broken link
