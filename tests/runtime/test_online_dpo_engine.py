"""Which pairs does Online DPO train on, and on which ranks? With toy models, on real Ray."""

import logging
from logging.handlers import BufferingHandler
from types import SimpleNamespace

import pytest
import torch
import yaml

from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.online_dpo_engine import OnlineDPOEngine
from tests.helpers.toy_modules import (
    PROMPTS,
    KeepsRows,
    ToyModule,
    ToyReference,
    ToyTrainer,
    UnevenPolicy,
    calls_of,
    rows_trained_on,
)

REWARDS = (
    (0.0, 3.0, 1.0, 2.0),
    (2.0, 0.0, 3.0, 1.0),
    (1.0, 2.0, 0.0, 3.0),
    (3.0, 3.0, 3.0, 3.0),
    (3.0, 1.0, 2.0, 0.0),
    (5.0, 5.0, 5.0, 4.5),
    (0.0, 0.0, 9.0, 0.0),
    (2.0, 3.0, 1.0, 0.0),
)
"""Of the four responses to each of eight prompts."""


class Ranking(ToyModule):
    """Rewards in the first episode are those above; in the second all are equal; then they rise."""

    def forward_step(self, data, iteration=0):
        places = (data["sample_index"] % 4).tolist()
        rewards = {
            1: [
                REWARDS[prompt][place] for prompt, place in zip(data["answer"], places, strict=True)
            ],
            2: [0.7] * len(places),
            3: places,
        }
        return {"rewards": torch.tensor(rewards[iteration], dtype=torch.float32)}


class PairTrainer(KeepsRows, ToyTrainer):
    """Pushes the rows of a pair apart."""

    def _step(self, batch):
        signs = torch.ones(len(batch["all_tokens"]))
        signs[1::2] = -1.0
        return super()._step({**batch, "advantages": signs})


def write_job(directory, **runtime):
    frozen = {"num_gpu": 1, "free_memory": True}
    sampling = {"seq_length": 8, "max_new_tokens": 6, "num_inference_per_prompt": 4, "seed": 1}
    models = {
        "policy": {**frozen, "model_args": sampling},
        "policy_trainer": {"num_gpu": 2, "trainable": True, "free_memory": True},
        "reference": frozen,
        "reward": {"num_cpu": 1},
    }
    settings = {
        "colocation": ["policy,policy_trainer,reference"], "num_episode": 3,
        "sample_per_episode": 32, "train_micro_batch_size": 2, "train_global_batch_size": 8,
        "data_shuffle": False, "output_dir": str(directory),
    }  # fmt: skip
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump({"models": models, "runtime": {**settings, **runtime}}))
    return path


def make_engine(path, *overrides):
    session.init(str(path), overrides)
    engine = OnlineDPOEngine(
        UnevenPolicy("policy"),
        ToyReference("reference"),
        Ranking("reward"),
        PairTrainer("policy_trainer"),
    )
    engine.set_dataset(PROMPTS[:8])
    return engine


@pytest.fixture(scope="module")
def job(shared_cluster, tmp_path_factory):
    """Three episodes, each with the responses to all eight prompts."""
    engine = make_engine(write_job(tmp_path_factory.mktemp("dpo")))
    handler = BufferingHandler(capacity=100)
    handler.setLevel(logging.WARNING)
    engine_logger = get_logger("chatlearn_vllm.runtime.online_dpo_engine")
    engine_logger.addHandler(handler)
    try:
        history = engine.learn()
    finally:
        engine_logger.removeHandler(handler)
    warnings = [record.getMessage() for record in handler.buffer]
    return SimpleNamespace(history=history, warnings=warnings, run_dir=engine.run_dir)


def test_each_rank_gets_the_best_and_the_worst_of_whole_prompts_side_by_side(job):
    ranks, _ = rows_trained_on(job.run_dir, "policy_trainer", 1)

    # Seven prompts give a pair, of which six are spread evenly: four in one step, two in the next.
    # (chosen, rejected) by prompt: 0 (1, 0), 1 (6, 5), 2 (11, 10), 4 (16, 19), 5 (20, 23),
    # 6 (26, 24), and 7, which is left out.
    assert ranks[0]["sample_index"].tolist() == [1, 0, 6, 5, 20, 23]
    assert ranks[1]["sample_index"].tolist() == [11, 10, 16, 19, 26, 24]
    for rows in ranks:
        assert rows["prompt_index"][0::2].tolist() == rows["prompt_index"][1::2].tolist()
        assert (rows["rewards"][0::2] > rows["rewards"][1::2]).all()
        assert rows["ref_logprobs"].tolist() == [[-2.0] * 7] * 6


def test_the_metrics_say_how_many_pairs_there_were(job):
    metrics = job.history[1]

    assert metrics["rollout/num_pairs"] == 7
    assert metrics["rollout/pair_fraction"] == 7 / 8
    margins = [3.0, 3.0, 3.0, 3.0, 0.5, 9.0, 3.0]
    assert metrics["rollout/pair_reward_margin_mean"] == pytest.approx(sum(margins) / 7)
    assert metrics["rollout/num_samples"] == 32
    assert "train/loss" in metrics


def test_an_episode_without_pairs_trains_nothing_and_goes_on(job):
    metrics = job.history[2]
    ranks, before = rows_trained_on(job.run_dir, "policy_trainer", 2)
    _, after = rows_trained_on(job.run_dir, "policy_trainer", 3)

    assert [len(rows["all_tokens"]) for rows in ranks] == [0, 0]
    assert torch.equal(before, after)
    assert metrics["rollout/num_pairs"] == metrics["rollout/pair_reward_margin_mean"] == 0
    assert "train/loss" not in metrics
    assert metrics["sync/weight_version"] == 3
    assert job.warnings == ["episode 2: no pair of responses with different rewards"]


def test_the_next_episode_trains_on_all_its_pairs(job):
    ranks, _ = rows_trained_on(job.run_dir, "policy_trainer", 3)

    assert ranks[0]["sample_index"].tolist() == [67, 64, 71, 68, 83, 80, 87, 84]
    assert ranks[1]["sample_index"].tolist() == [75, 72, 79, 76, 91, 88, 95, 92]


def test_the_reference_scores_only_where_there_are_pairs(job):
    calls = calls_of(job.run_dir)

    assert calls.count("reference forward_step") == 2
    assert calls.count("policy_trainer train 0") == 1


def test_one_response_per_prompt_makes_no_pair(tmp_path):
    with pytest.raises(ValueError, match="num_inference_per_prompt=1 gives one response"):
        make_engine(write_job(tmp_path), "models.policy.model_args.num_inference_per_prompt=1")


def test_learning_rates_fall_over_the_steps_that_pairs_make(tmp_path):
    keys = "models.policy_trainer.model_args."
    falling = [f"{keys}lr_decay_style=cosine", f"{keys}lr_warmup_iters=5"]

    def num_steps(*overrides):
        job = make_engine(write_job(tmp_path), *falling, *overrides).job
        return job.models["policy_trainer"].model_args.lr_decay_iters

    # 32 responses to 8 prompts make up to 8 pairs, 16 rows, two steps in each of three episodes
    assert num_steps() == 6
    assert num_steps("runtime.num_training_epoch=2") == 12
    assert num_steps("runtime.max_relay_episode=-1") == 2 + 4 + 6
    kept_from = "runtime.relay_episode_offset=2"
    assert num_steps("runtime.max_relay_episode=-1", kept_from) == 2 + 2 + 4
    assert num_steps(f"{keys}lr_decay_iters=7") == 7
    with pytest.raises(ValueError, match="lr_warmup_iters=6 must be less than 6, the most"):
        num_steps(f"{keys}lr_warmup_iters=6")


def test_every_rank_must_get_whole_pairs_of_a_step(tmp_path):
    sizes = ["runtime.train_micro_batch_size=1", "runtime.sample_per_episode=24"]

    with pytest.raises(ValueError, match="train_global_batch_size=6 must be a multiple of 4"):
        make_engine(write_job(tmp_path), "runtime.train_global_batch_size=6", *sizes)
