"""Is a job stopped whose engine generates with other weights than the trainer's? All parts real."""

import json
import re

import pytest
import torch

from chatlearn_vllm import GRPOEngine, load_config
from chatlearn_vllm.runtime.errors import RankError
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.job_modules import CountingPolicy, DigitReward
from tests.helpers.tiny_llama import save_tiny_llama
from tests.jobs.test_grpo_job import PROMPTS, write_job
from tests.runtime.conftest import left_after, rank_processes

LEVELS = {"mismatch_stop": {"rollout_kl": 0.001, "logprob_abs_diff_mean": 10.0}}


class SpoiltPolicy(CountingPolicy):
    """Something writes into its weights after the second sync."""

    imports = 0

    def import_weights(self, *args):
        super().import_weights(*args)
        self.imports += 1
        if self.imports == 2:
            generator = torch.Generator().manual_seed(0)
            for parameter in self.engine.parameters().values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.1 * parameter.data.std(correction=0) * noise


def make_engine(job, policy_class=CountingPolicy):
    policy, reward = policy_class("policy", job), DigitReward("reward", job)
    engine = GRPOEngine(policy, None, reward, PolicyTrainer("policy_trainer", job))
    engine.set_dataset(PROMPTS)
    return engine


@pytest.fixture
def model_dir(tmp_path):
    save_tiny_llama(tmp_path / "model")
    return tmp_path / "model"


def test_a_job_with_wrong_rollout_weights_stops_and_goes_on_from_its_checkpoint(
    existing_cluster, tmp_path, model_dir
):
    job = write_job(
        tmp_path, model_dir, policy={}, trainer={}, colocation=["policy,policy_trainer"],
        num_gpu=1, save_episode_interval=1, **LEVELS,
    )  # fmt: skip

    with pytest.raises(RankError) as caught:
        make_engine(job, SpoiltPolicy).learn()

    message = str(caught.value)
    assert caught.value.rank.module == "policy_trainer"
    found = re.search(
        r"MismatchError: episode 2, rollouts of weight version 2: rollout_kl=([\d.]+) is above "
        r"runtime.mismatch_stop.rollout_kl=0.001\. No optimizer step was made",
        message,
    )
    assert found, message
    assert 0.001 < float(found[1]) < 10
    assert left_after(30, rank_processes, existing_cluster) == {}
    metrics = tmp_path / "run" / "metrics.jsonl"
    (_, first) = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert first["episode"] == 1
    assert first["train/rollout_kl"] < 1e-9 and first["train/rollout_clip_fraction"] == 0

    # The same job without the fault: the checkpoint of episode 1 is whole.
    (second,) = make_engine(job).learn()

    assert second["episode"] == 2
    assert second["train/rollout_kl"] < 1e-9


def test_levels_are_dropped_with_one_word_where_sampling_makes_the_sides_differ(
    tmp_path, model_dir, caplog
):
    job = write_job(tmp_path, model_dir, policy={"top_p": 0.9}, trainer={})
    with caplog.at_level("WARNING", logger="chatlearn_vllm"):
        engine = make_engine(job)

    (record,) = [r for r in caplog.records if "mismatch_warn" in r.getMessage()]
    assert "models.policy are not those of models.policy_trainer even with equal weights" in (
        record.getMessage()
    )
    assert "top_p=0.9" in record.getMessage()
    assert engine.job.runtime.mismatch_warn.set_levels() == {}  # what the ranks will get
    with pytest.raises(ValueError, match=r"(?s)mismatch_stop=\{'rollout_kl': 1\.0\}.*top_p=0\.9"):
        make_engine(load_config(job.path, ["runtime.mismatch_stop.rollout_kl=1"]))
