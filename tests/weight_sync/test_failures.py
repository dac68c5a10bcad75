"""What is left of a weight sync in which a rank dies or raises? Real Ray, vLLM, megatron-core.

A death in each phase of a sync, with smaller models: tests/runtime/test_weight_sync.py.
"""

import os
import signal
from contextlib import contextmanager

import pytest
import torch

from chatlearn_vllm import GRPOEngine
from chatlearn_vllm.runtime.errors import RankDiedError, RankError, RankId
from chatlearn_vllm.runtime.rollout import Rollout
from chatlearn_vllm.runtime.worker_group import gather
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.fault_in_copy import FaultInCopy
from tests.helpers.job_modules import CountingPolicy, DigitReward
from tests.helpers.tiny_llama import save_tiny_llama
from tests.jobs.test_grpo_job import PROMPTS, write_job
from tests.runtime.conftest import left_after, rank_processes

LAST_RANK = 1


class FaultyPolicy(CountingPolicy):
    """Fails inside a copy once it was told to, on one rank and for one sync."""

    fault = None

    def set_fault(self, fault):
        self.fault = fault

    def import_weights(self, *args):
        if self.fault is None:
            return super().import_weights(*args)
        fault, self.fault = self.fault, None
        with FaultInCopy(fault):
            return super().import_weights(*args)

    def weights(self):
        return {name: p.detach().clone() for name, p in self.engine.parameters().items()}


class FaultyTrainer(PolicyTrainer):
    """Ends its process while it exports, once it was told to."""

    ends_in_export = False

    def end_in_export(self):
        self.ends_in_export = True

    def export_weights(self, *args):
        export = super().export_weights(*args)
        if self.ends_in_export:
            os._exit(1)
        return export

    def change_weights(self):
        for tensor in self.local_parameters().values():
            tensor.mul_(1.5)


class DyingPolicy(FaultyPolicy):
    """The last replica's process ends inside a copy of the sync after the first episode."""

    imports = 0

    def import_weights(self, *args):
        self.imports += 1
        if self.imports == 2 and self.replica_id == LAST_RANK:
            self.set_fault("exit")
        return super().import_weights(*args)


def make_engine(directory, policy_class=FaultyPolicy):
    """Two replicas that read from both tensor parallel ranks of a trainer."""
    save_tiny_llama(directory / "model")
    job = write_job(
        directory, directory / "model", policy={}, trainer={"tensor_model_parallel_size": 2}
    )
    policy, reward = policy_class("policy", job), DigitReward("reward", job)
    engine = GRPOEngine(policy, None, reward, FaultyTrainer("policy_trainer", job))
    engine.set_dataset(PROMPTS)
    return engine


@contextmanager
def synced_job(directory, address):
    """A job after its first sync whose trainer has changed since; it leaves no process behind."""
    engine = make_engine(directory)
    try:
        engine.setup()
        engine.before_episodes()
        engine.groups["policy_trainer"].call("change_weights")
        yield engine
    finally:
        engine.teardown()
        assert left_after(30, rank_processes, address) == {}


def tell(engine, name, method, *args):
    """Call a method of the model's last rank only."""
    gather([engine.groups[name].start_on(LAST_RANK, method, *args)])


def difference_to_trainer(engine) -> float:
    """Largest difference of log-probabilities of new samples between policy and trainer."""
    batch = Rollout(engine.groups["policy"]).generate([0, 1, 2, 3], 0, 4, iteration=1)
    scores = engine.groups["policy_trainer"].call("compute_logprobs", batch)[0]
    return ((scores - batch["logprobs"]).abs() * batch["loss_mask"][:, 1:]).max().item()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "during"])
def test_the_death_of_a_training_rank_leaves_the_engines_with_the_weights_they_had(
    existing_cluster, tmp_path, when
):
    with synced_job(tmp_path, existing_cluster) as engine:
        policy, trainer = engine.groups["policy"], engine.groups["policy_trainer"]
        before = policy.call("weights")
        if when == "before":
            os.kill(trainer.ranks[LAST_RANK].location.pid, signal.SIGKILL)
        else:
            tell(engine, "policy_trainer", "end_in_export")

        with pytest.raises(RankDiedError) as caught:
            engine.weight_sync.sync()

        assert caught.value.rank == RankId("policy_trainer", 0, LAST_RANK, 2)
        assert "died during export_weights()" in str(caught.value)
        # No copy began.
        assert policy.call("engine_state") == ["READY(1)", "READY(1)"]
        for old, new in zip(before, policy.call("weights"), strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.slow
def test_a_job_ends_when_a_rollout_rank_dies_inside_a_copy(existing_cluster, tmp_path):
    with pytest.raises(RankDiedError) as caught:
        make_engine(tmp_path, DyingPolicy).learn()

    assert caught.value.rank == RankId("policy", LAST_RANK, 0, 1)
    assert "died during import_weights()" in str(caught.value)
    assert left_after(30, rank_processes, existing_cluster) == {}


def test_a_sync_that_failed_inside_a_copy_can_be_run_again(existing_cluster, tmp_path):
    with synced_job(tmp_path, existing_cluster) as engine:
        policy = engine.groups["policy"]
        assert difference_to_trainer(engine) > 0.1
        before = policy.call("weights")[LAST_RANK]
        tell(engine, "policy", "set_fault", "raise")

        with pytest.raises(RankError) as caught:
            engine.weight_sync.sync()

        assert caught.value.rank == RankId("policy", LAST_RANK, 0, 1)
        assert "import_weights() raised" in str(caught.value)
        assert "a copy failed" in str(caught.value)
        assert policy.call("engine_state") == ["STALE(1)", "STALE(1)"]  # also where all went well
        after = policy.call("weights")[LAST_RANK]
        is_old = [torch.equal(before[name], after[name]) for name in before]
        assert any(is_old) and not all(is_old)  # two versions are mixed
        with pytest.raises(RankError, match=r"(?s)policy, replica .*EngineStateError.*STALE\(1\)"):
            difference_to_trainer(engine)

        report = engine.weight_sync.sync()

        assert policy.call("engine_state") == [f"READY({report.version})"] * 2
        assert difference_to_trainer(engine) < 1e-4
