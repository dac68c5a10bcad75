"""What does the GRPO engine train on: dynamic sampling, several rewards, and its estimators?"""

import json
import logging
from logging.handlers import BufferingHandler
from types import SimpleNamespace

import pytest
import torch
import yaml

from chatlearn_vllm.job.flow import FlowError
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.evaluator import Evaluator
from chatlearn_vllm.runtime.grpo_engine import GRPOEngine
from tests.helpers.toy_modules import (
    PROMPTS,
    KeepsRows,
    ToyModule,
    ToyTrainer,
    UnevenPolicy,
    calls_of,
    rows_trained_on,
)

DISPUTED = (1, 2, 5, 6, 7, 9)
"""Prompts of which one of the two responses is right; to the others both are."""
STYLE_WEIGHT = 0.5


class Judge(ToyModule):
    """Says who is right, and gives a bonus that differs from response to response."""

    def forward_step(self, data, iteration=0):
        samples = data["sample_index"]
        self.note("forward_step " + ",".join(map(str, samples.tolist())))
        is_disputed = torch.tensor([answer in DISPUTED for answer in data["answer"]])
        accuracy = torch.where(is_disputed & (samples % 2 == 1), 0.0, 1.0)
        return {"rewards": accuracy + 0.001 * samples, "accuracy": accuracy}


class Style(ToyModule):
    """Another reward."""

    def forward_step(self, data, iteration=0):
        return {"rewards": 10.0 * (data["sample_index"] % 3)}


class Trainer(KeepsRows, ToyTrainer):
    pass


class EngineWithoutRanks(GRPOEngine):
    """What its frozen models return is known, by name."""

    weight_version = 3
    answers = {}

    def forward(self, module, batch, episode):
        return dict(self.answers[module.name])


def write_job(directory, **runtime):
    """Two prompts' responses per replica and rollout; no reference."""
    frozen = {"num_gpu": 2, "free_memory": True}
    sampling = {"seq_length": 8, "max_new_tokens": 6, "num_inference_per_prompt": 2, "seed": 1}
    models = {
        "policy": {**frozen, "model_args": sampling},
        "policy_trainer": {"num_gpu": 1, "trainable": True, "free_memory": True},
        "reference": frozen,
        "judge": {"num_cpu": 1},
        "reward": {"num_cpu": 1},
        "style": {"num_cpu": 1, "reward_weight": STYLE_WEIGHT},
    }
    settings = {
        "colocation": ["policy,policy_trainer"], "num_episode": 2, "sample_per_episode": 8,
        "train_micro_batch_size": 4, "train_global_batch_size": 8, "data_shuffle": False,
        "output_dir": str(directory),
    }  # fmt: skip
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump({"models": models, "runtime": {**settings, **runtime}}))
    return path


def dynamic_sampling_engine(path, *overrides):
    session.init(str(path), overrides)
    rewards = [Judge("judge"), Style("style")]
    engine = GRPOEngine(UnevenPolicy("policy"), None, rewards, Trainer("policy_trainer"))
    engine.set_dataset(PROMPTS)
    return engine


def test_an_evaluation_adds_several_rewards_as_training_does(shared_cluster, tmp_path):
    session.init(str(write_job(tmp_path, num_episode=1, enable_eval_before_training=True)))
    policy, rewards = UnevenPolicy("policy"), [Judge("judge"), Style("style")]
    engine = GRPOEngine(policy, None, rewards, Trainer("policy_trainer"))
    engine.set_dataset(PROMPTS).set_evaluator(Evaluator(policy, rewards, PROMPTS))

    metrics = engine.learn()[0]

    lines = (engine.run_dir / "eval" / "episode_000000.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    by_judge = [1.0 + 0.001 * index - (index % 2 == 1 and index in DISPUTED) for index in range(16)]
    by_style = [10.0 * (index % 3) for index in range(16)]
    expected = [one + STYLE_WEIGHT * other for one, other in zip(by_judge, by_style, strict=True)]
    assert [sample["rewards"] for sample in samples] == pytest.approx(expected)
    assert [sample["rewards/style"] for sample in samples] == by_style
    assert metrics["eval/reward_mean"] == pytest.approx(sum(expected) / 16)
    assert metrics["eval/rewards/judge_mean"] == pytest.approx(sum(by_judge) / 16)
    assert metrics["eval/rewards/style_mean"] == pytest.approx(sum(by_style) / 16)


def test_an_evaluation_is_refused_what_is_no_reward(tmp_path):
    session.init(str(write_job(tmp_path)))
    policy = UnevenPolicy("policy")
    for reward in ([], [Judge], "judge", Judge):
        with pytest.raises(FlowError, match="with a list of modules in the place of reward"):
            Evaluator(policy, reward, PROMPTS)


@pytest.fixture(scope="module")
def dynamic_job(shared_cluster, tmp_path_factory):
    """Two episodes of dynamic sampling; prompts 0 to 15 and again from 0, four per rollout."""
    path = write_job(
        tmp_path_factory.mktemp("dynamic"),
        dynamic_sampling=True,
        max_num_gen_batches=3,
        save_episode_interval=1,
    )
    engine = dynamic_sampling_engine(path)
    handler = BufferingHandler(capacity=100)
    handler.setLevel(logging.WARNING)
    engine_logger = get_logger("chatlearn_vllm.runtime.grpo_engine")
    engine_logger.addHandler(handler)
    try:
        history = engine.learn()
    finally:
        engine_logger.removeHandler(handler)
    warnings = [record.getMessage() for record in handler.buffer]
    return SimpleNamespace(history=history, warnings=warnings, run_dir=engine.run_dir, path=path)


def test_prompts_are_drawn_until_enough_groups_have_right_and_wrong_answers(dynamic_job):
    metrics = dynamic_job.history[1]
    (rows,), _ = rows_trained_on(dynamic_job.run_dir, "policy_trainer", 1)

    assert rows["answer"] == [1, 1, 2, 2, 5, 5, 6, 6]  # 7 is one too many
    assert rows["sample_index"].tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    assert metrics["rollout/num_gen_batches"] == 2
    assert metrics["rollout/informative_fraction"] == 10 / 16
    assert metrics["rollout/rewards/style_mean"] == 150 / 16  # of all samples, 0 to 15


def test_after_the_last_rollout_an_episode_is_filled_up_with_a_warning(dynamic_job):
    metrics = dynamic_job.history[2]
    (rows,), _ = rows_trained_on(dynamic_job.run_dir, "policy_trainer", 2)

    # of the prompts 8 to 15 and 0 to 3 three are disputed; 8 is the first of the others
    assert rows["answer"] == [9, 9, 1, 1, 2, 2, 8, 8]
    assert metrics["rollout/num_gen_batches"] == 3
    assert metrics["rollout/informative_fraction"] == 6 / 24
    (warning,) = dynamic_job.warnings
    assert warning.startswith("episode 2: 6 of 8 samples are in groups with different rewards")
    assert "after 3 batches" in warning


def test_the_policy_stays_awake_until_the_last_rollout_is_scored(dynamic_job):
    calls = calls_of(dynamic_job.run_dir)

    calls = calls[: calls.index("policy_trainer train 8")]
    second, sleep = calls.index("policy generate train 8"), len(calls) - 2
    assert calls[sleep:] == ["policy sleep", "policy_trainer onload weights grads optimizer"]
    assert sorted(samples_scored(calls[:second])) == list(range(8))
    assert sorted(samples_scored(calls[second:sleep])) == list(range(8, 16))


def test_no_sample_has_the_seed_of_another_also_after_a_resume(dynamic_job):
    before = calls_of(dynamic_job.run_dir)
    assert sorted(samples_scored(before)) == list(range(40))  # two rollouts, then three, of eight

    (resumed,) = dynamic_sampling_engine(
        dynamic_job.path, "runtime.load_data_checkpoint_iteration=1"
    ).learn()

    after = calls_of(dynamic_job.run_dir)[len(before) :]
    assert sorted(samples_scored(after)) == list(range(16, 40))
    for name in ("rollout/reward_mean", "rollout/num_gen_batches", "train/loss"):
        assert resumed[name] == dynamic_job.history[2][name]


def relay_engine(path, *overrides):
    session.init(str(path), overrides)
    engine = GRPOEngine(UnevenPolicy("policy"), None, Style("style"), Trainer("policy_trainer"))
    engine.set_dataset(PROMPTS)
    return engine


def test_earlier_episodes_are_trained_on_again_also_after_a_resume(shared_cluster, tmp_path):
    path = write_job(
        tmp_path, max_relay_episode=2, relay_episode_offset=2, num_episode=4,
        save_episode_interval=1,
    )  # fmt: skip
    engine = relay_engine(path)
    history = engine.learn()

    samples = [
        rows["sample_index"].tolist()
        for (rows,) in (
            rows_trained_on(engine.run_dir, "policy_trainer", episode)[0] for episode in (1, 2, 3)
        )
    ]
    assert [sorted(rows) for rows in samples] == [
        list(range(8)),
        list(range(8, 16)),  # the first is not kept
        list(range(8, 24)),
    ]
    saved = sorted(path.name for path in (engine.run_dir / "checkpoints/driver").iterdir())
    assert saved == [
        "episode_00000001.json",  # keeps nothing
        *(f"episode_0000000{number}.{kind}" for number in (2, 3, 4) for kind in ("json", "pt")),
    ]

    def only_the_earlier(buffers):
        return buffers[0].batch

    resumed = relay_engine(path, "runtime.load_data_checkpoint_iteration=3")
    resumed.set_relay_sample_fn(only_the_earlier)
    (last,) = resumed.learn()

    for name in ("rollout/reward_mean", "rollout/weight_version"):
        assert last[name] == history[-1][name]
    (rows,), _ = rows_trained_on(engine.run_dir, "policy_trainer", 4)
    assert sorted(rows["sample_index"].tolist()) == list(range(16, 24))


def test_rewards_are_added_each_times_its_weight(dynamic_job):
    (rows,), _ = rows_trained_on(dynamic_job.run_dir, "policy_trainer", 1)
    of_judge = rows["accuracy"] + 0.001 * rows["sample_index"]
    of_style = 10.0 * (rows["sample_index"] % 3)

    torch.testing.assert_close(rows["rewards"], of_judge + STYLE_WEIGHT * of_style)
    assert of_style.unique().tolist() == [0.0, 10.0, 20.0]


def test_the_speed_of_generation_counts_all_rollouts_of_an_episode(dynamic_job):
    metrics = dynamic_job.history[1]
    num_tokens = sum(1 + sample % 5 for sample in range(16))

    assert metrics["rollout/tokens_per_s"] * metrics["time/rollout_s"] == pytest.approx(num_tokens)


def test_each_reward_has_a_metric_of_its_own(tmp_path):
    metrics = reward_metrics_of(tmp_path, {"judge": [0.75, 0.5], "style": [2.0, 6.0]})

    assert metrics["rollout/rewards/judge_mean"] == 0.625
    assert metrics["rollout/rewards/style_mean"] == 4.0
    assert metrics["rollout/reward_mean"] == 0.625 + STYLE_WEIGHT * 4.0


def test_a_reward_called_reward_keeps_its_metric_beside_the_sum(tmp_path):
    metrics = reward_metrics_of(tmp_path, {"reward": [0.75, 0.5], "style": [2.0, 6.0]})

    assert {0.625, 4.0, 2.625} <= set(metrics.values())


def test_a_reward_that_is_no_number_ends_the_job_before_training(tmp_path):
    with pytest.raises(ValueError, match="models.style: .* is NaN or infinite: 1"):
        reward_metrics_of(tmp_path, {"judge": [0.75, 0.5], "style": [2.0, float("nan")]})


def test_a_reference_must_say_something_of_every_token(tmp_path):
    for wrong in ({"logprobs": REF_LOGPROBS}, {"ref_logprobs": REF_LOGPROBS[:, :1]}):
        with pytest.raises(ValueError, match=r"models.reference: .* 'ref_logprobs', .* \[2, 2\]"):
            prepared(tmp_path, "init_kl_coef=0.1", reference_says=wrong, **TWO_ROWS)


def test_dynamic_sampling_needs_a_reward_that_can_score_beside_the_policy(tmp_path):
    path = write_job(
        tmp_path, dynamic_sampling=True, colocation=["policy,policy_trainer,reference"]
    )
    session.init(str(path))
    policy, trainer = BaseModule("policy"), BaseModule("policy_trainer")
    with pytest.raises(ValueError, match="models.reference shares its devices and gives their"):
        GRPOEngine(policy, None, [BaseModule("judge"), BaseModule("reference")], trainer)

    allowed = [
        ("reference", ["models.reference.free_memory=False"]),
        ("reference", ["runtime.colocation=[]"]),
        ("judge", ["models.judge.free_memory=True", "models.judge.force_free_memory=True"]),
    ]
    for name, overrides in allowed:
        session.init(str(path), overrides)
        policy, trainer = BaseModule("policy"), BaseModule("policy_trainer")
        GRPOEngine(policy, None, BaseModule(name), trainer)


def test_advantages_compare_a_response_with_its_group(tmp_path):
    rewards, groups = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([4, 4, 7, 7])

    batch, metrics = prepared(tmp_path, rewards=rewards, prompt_index=groups)
    torch.testing.assert_close(batch["advantages"], torch.tensor([1.0, -1.0, 0.0, 0.0]))
    assert torch.equal(batch["rewards"], rewards) and metrics == {}

    batch, _ = prepared(tmp_path, "advantage_std=False", rewards=2 * rewards, prompt_index=groups)
    assert batch["advantages"].tolist() == [2.0, -2.0, 0.0, 0.0]


def test_rloo_compares_with_the_mean_of_the_others(tmp_path):
    batch, _ = prepared(
        tmp_path,
        "advantage_estimator=rloo",
        rewards=torch.tensor([3.0, 1.0, 0.0, 5.0, 9.0]),
        prompt_index=torch.tensor([4, 4, 4, 7, 7]),
    )
    assert batch["advantages"].tolist() == [2.5, -0.5, -2.0, -4.0, 4.0]  # 3 - (1 + 0) / 2, ...


REINFORCE = ("advantage_estimator=reinforce++", "gamma=0.5", "cliprange_reward=1.0")
TWO_ROWS = {
    "rewards": torch.tensor([5.0, 0.0]),  # 5 is clipped to 1
    "prompt_index": torch.tensor([0, 1]),
    "logprobs": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
    "loss_mask": torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]),
}
REF_LOGPROBS = torch.tensor([[-2.0, -2.0], [-3.0, -7.0]])
REF_SAYS = {"ref_logprobs": REF_LOGPROBS}


def test_reinforce_whitens_discounted_returns_over_all_tokens(tmp_path):
    batch, _ = prepared(tmp_path, *REINFORCE, **TWO_ROWS)

    # returns 0.5 and 1, and 0: mean 1/2, variance 1/6
    expected = torch.tensor([[0.0, 1.5**0.5], [-(1.5**0.5), 0.0]])
    torch.testing.assert_close(batch["advantages"], expected)


def test_reinforce_takes_the_kl_off_the_rewards_and_not_off_the_loss(tmp_path):
    batch, _ = prepared(
        tmp_path, *REINFORCE, "init_kl_coef=0.1", reference_says=REF_SAYS, **TWO_ROWS
    )

    # the first token is one nat above the reference: returns 0.5 - 0.1 and 1, and 0
    expected = torch.tensor([[-0.162221, 1.297771], [-1.135550, 0.0]])
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-5, rtol=0)
    assert "ref_logprobs" not in batch


def test_rollouts_without_logprobs_are_enough_where_nothing_is_computed_of_them(tmp_path):
    whole, _ = prepared(tmp_path, *REINFORCE, **TWO_ROWS)
    bare = {name: value for name, value in TWO_ROWS.items() if name != "logprobs"}
    batch, _ = prepared(tmp_path, *REINFORCE, **bare)
    assert torch.equal(batch["advantages"], whole["advantages"])
    for keys, needed_by in (
        ((*REINFORCE, "init_kl_coef=0.1"), "the KL penalty of the rewards"),
        (("tis_imp_ratio_cap=2.0",), "tis_imp_ratio_cap"),
    ):
        with pytest.raises(ValueError) as refusal:
            says = REF_SAYS if "init_kl_coef=0.1" in keys else None
            prepared(tmp_path, *keys, reference_says=says, **bare)
        assert str(refusal.value).startswith(
            f"models.policy: decode_internal() must return 'logprobs', which {needed_by} needs;"
        )


def test_other_estimators_leave_the_kl_to_the_loss(tmp_path):
    batch, _ = prepared(tmp_path, "init_kl_coef=0.1", reference_says=REF_SAYS, **TWO_ROWS)
    assert torch.equal(batch["ref_logprobs"], REF_LOGPROBS)


def test_responses_that_come_close_to_the_limit_lose_reward(tmp_path):
    lengths = torch.tensor([1, 2, 3, 6])
    batch, metrics = prepared(
        tmp_path,
        "overlong_buffer_len=4",
        "overlong_penalty_factor=0.5",
        "advantage_estimator=rloo",
        rewards=torch.ones(4),
        prompt_index=torch.tensor([0, 0, 1, 1]),
        loss_mask=(torch.arange(8) < lengths[:, None]).float(),
    )
    # max_new_tokens of the policy is 6, so a response of 2 loses nothing and one of 6 all of 0.5
    assert batch["rewards"].tolist() == [1.0, 1.0, 0.875, 0.5]
    assert batch["advantages"].tolist() == [0.0, 0.0, 0.375, -0.375]
    assert metrics == {"rollout/overlong_penalty_mean": -0.625 / 4}


def reward_metrics_of(tmp_path, rewards_of):
    """Metrics of a batch of two rows, on which some reward modules say what is given."""
    session.init(str(write_job(tmp_path)))
    modules = [BaseModule(name) for name in rewards_of]
    engine = EngineWithoutRanks(BaseModule("policy"), None, modules, BaseModule("policy_trainer"))
    engine.answers = {
        name: {"rewards": torch.tensor(rewards)} for name, rewards in rewards_of.items()
    }
    batch = {"loss_mask": torch.ones(2, 3)}
    return engine.add_rewards(batch, episode=1) | engine.sample_metrics(batch)


def samples_scored(calls):
    """Ordinals of all samples that the judge saw, in order."""
    scored = [call.split()[-1] for call in calls if call.startswith("judge forward_step")]
    return [int(sample) for samples in scored for sample in samples.split(",")]


def prepared(tmp_path, *trainer_keys, reference_says=None, **batch):
    """What `prepare` makes of a batch, of an engine whose trainer has some keys."""
    overrides = [f"models.policy_trainer.model_args.{key}" for key in trainer_keys]
    session.init(str(write_job(tmp_path)), overrides)
    reference = BaseModule("reference") if reference_says else None
    engine = EngineWithoutRanks(
        BaseModule("policy"), reference, BaseModule("judge"), BaseModule("policy_trainer")
    )
    engine.answers = {"reference": reference_says}
    return engine.prepare(batch, episode=1)
