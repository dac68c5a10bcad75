"""What happens in an episode of PPO, with six toy models, on real Ray?"""

from types import SimpleNamespace

import pytest
import torch
import yaml

from chatlearn_vllm.algorithms.gae import gae, moments, token_rewards, whiten
from chatlearn_vllm.data.batch import concat, select
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.checkpoint import load_state
from chatlearn_vllm.runtime.evaluator import Evaluator
from chatlearn_vllm.runtime.rlhf_engine import RLHFEngine
from tests.helpers.toy_modules import (
    GOOD_TOKEN,
    PROMPTS,
    KeepsRows,
    ToyReference,
    ToyReward,
    ToyTrainer,
    ToyValue,
    ToyValueTrainer,
    UnevenPolicy,
    calls_of,
    predicted_values,
    rows_trained_on,
)

GAMMA, LAM, CLIP_REWARD = 0.9, 0.8, 0.3
KL_COEF, TARGET, HORIZON, NUM_SAMPLES = 0.5, 0.1, 100, 16
SIX_ROLES = "policy,reference,reward,value,ppo_policy,ppo_value"
FIVE_ROLES = "policy,reference,reward,ppo_policy,ppo_value"
POLICY_KEYS = {
    "lr": 0.5, "gamma": GAMMA, "lam": LAM, "cliprange_reward": CLIP_REWARD,
    "init_kl_coef": KL_COEF, "fix_kl_coef": False, "target": TARGET, "horizon": HORIZON,
}  # fmt: skip
SAMPLING = {"seq_length": 8, "max_new_tokens": 6, "num_inference_per_prompt": 2}


class TokenReference(ToyReference):
    """Some tokens are likelier than others, so that the KL differs from token to token."""

    def forward_step(self, data, iteration=0):
        super().forward_step(data, iteration)
        return {"ref_logprobs": reference_logprobs(data)}


class CountsCheckpoints:
    """Notes how many checkpoints the driver calls complete when this one is saved."""

    def save_checkpoint(self, iteration):
        states = list((self.runtime_args.run_dir / "checkpoints" / "driver").glob("*.json"))
        self.note(f"sees {len(states)} complete checkpoints")
        super().save_checkpoint(iteration)


class PolicyTrainer(CountsCheckpoints, KeepsRows, ToyTrainer):
    pass


class ValueTrainer(CountsCheckpoints, KeepsRows, ToyValueTrainer):
    pass


class ValueTrainerInReverse(ValueTrainer):
    """The first rank has the last rows."""

    @property
    def data_parallel_rank(self):
        return self.world_size - 1 - self.rank


def reference_logprobs(data):
    return -2.0 - 0.1 * data["all_tokens"][:, 1:]


def write_job(directory, colocation=FIVE_ROLES, **runtime):
    """A job whose models give their memory back; the rows of `ppo_value` are on two ranks."""
    frozen = {"num_gpu": 1, "free_memory": True}
    trained = {**frozen, "trainable": True}
    models = {
        "policy": {**frozen, "model_args": SAMPLING},
        "reference": frozen,
        "reward": frozen,
        "value": frozen,
        "ppo_policy": {**trained, "model_args": POLICY_KEYS},
        "ppo_value": {**trained, "num_gpu": 2, "model_args": {"lr": 0.5}},
    }
    settings = {
        "colocation": [colocation], "num_episode": 2, "sample_per_episode": NUM_SAMPLES,
        "train_micro_batch_size": 4, "train_global_batch_size": 8, "output_dir": str(directory),
    }  # fmt: skip
    (directory / "job.yaml").write_text(
        yaml.safe_dump({"models": models, "runtime": {**settings, **runtime}})
    )
    return directory / "job.yaml"


def make_engine(path, *overrides, value=True, value_trainer=ValueTrainer):
    session.init(str(path), overrides)
    engine = RLHFEngine(
        UnevenPolicy("policy"),
        TokenReference("reference"),
        ToyReward("reward"),
        ToyValue("value") if value else None,
        PolicyTrainer("ppo_policy"),
        value_trainer("ppo_value"),
    )
    engine.set_dataset(PROMPTS)
    return engine


@pytest.fixture(scope="module")
def colocated_job(shared_cluster, tmp_path_factory):
    """All six roles on the same devices, for two episodes; evaluated before the first."""
    directory = tmp_path_factory.mktemp("six")
    path = write_job(directory, SIX_ROLES, enable_eval_before_training=True)
    engine = make_engine(path, "models.ppo_value.num_gpu=1")
    engine.set_evaluator(Evaluator(engine.policy, engine.rewards[0], PROMPTS))
    return SimpleNamespace(history=engine.learn(), run_dir=engine.run_dir)


@pytest.fixture(scope="module")
def job_of_five(shared_cluster, tmp_path_factory):
    """`ppo_value` scores itself; a checkpoint after each of two episodes."""
    path = write_job(tmp_path_factory.mktemp("five"), save_episode_interval=1)
    engine = make_engine(path, value=False, value_trainer=ValueTrainerInReverse)
    return SimpleNamespace(history=engine.learn(), run_dir=engine.run_dir, path=path)


def test_values_are_scored_first_then_the_value_model_is_trained_and_then_the_policy(colocated_job):
    calls = calls_of(colocated_job.run_dir)

    set_up = calls.index("ppo_value onload weights")
    assert [call for call in calls[:set_up] if "setup" in call] == [
        f"{name} model_setup"
        for name in ("ppo_policy", "ppo_value", "reference", "value", "reward", "policy")
    ]
    to_value = [
        "ppo_value offload grads optimizer",
        "value onload",
        "ppo_value export_weights",
        "value import_weights",
        "value finish_weight_sync {version}",
        "value offload",
        "ppo_value offload weights",
    ]
    to_policy = [
        "ppo_policy offload grads optimizer",
        "policy wake_weights",
        "ppo_policy export_weights",
        "policy import_weights",
        "policy finish_weight_sync {version}",
        "ppo_policy offload weights",
        "policy wake_kv_cache",
    ]
    first_syncs = ["ppo_value onload weights", *to_value, "ppo_policy onload weights", *to_policy]
    scores = [("reward", 16), ("reference", ""), ("value", 16)]
    episode = [
        "policy generate train {first}",
        "policy sleep",
        *(
            call
            for name, rows in scores
            for call in (f"{name} onload", f"{name} forward_step {rows}".strip(), f"{name} offload")
        ),
        "ppo_value onload weights grads optimizer",
        "ppo_value train 16",
        *to_value,
        "ppo_policy onload weights grads optimizer",
        "ppo_policy train 16",
        *to_policy,
    ]
    evaluated = calls.index("policy generate eval 0")
    assert calls[set_up:evaluated] == [call.format(version=1) for call in first_syncs]
    assert calls[calls.index("policy generate train 0") : -6] == [
        *(call.format(first=0, version=2) for call in episode),
        *(call.format(first=NUM_SAMPLES, version=3) for call in episode),
    ]


def test_a_reward_model_is_in_memory_whenever_it_scores(colocated_job):
    of_reward = [call.split()[1] for call in calls_of(colocated_job.run_dir) if "reward" in call]

    assert of_reward == [
        "model_setup",
        "offload",
        *["onload", "forward_step", "offload"] * 3,  # in evaluation, then in two episodes
        "shutdown",
    ]


def test_without_a_value_model_its_trainer_scores_and_both_trainers_save_before_the_driver(
    job_of_five,
):
    calls = calls_of(job_of_five.run_dir)

    set_up = calls.index("ppo_policy onload weights")  # no sync into a value model before it
    assert "ppo_value onload weights" not in calls[:set_up]
    scored = calls.index("ppo_value forward_step 8")
    assert calls[scored - 2 : scored + 14] == [
        "reference offload",
        "ppo_value onload weights",
        "ppo_value forward_step 8",
        "ppo_value offload weights",
        "ppo_value onload weights grads optimizer",
        "ppo_value train 8",
        "ppo_value sees 0 complete checkpoints",
        "ppo_value save_checkpoint 1",
        "ppo_value offload grads optimizer",
        "ppo_value offload weights",
        "ppo_policy onload weights grads optimizer",
        "ppo_policy train 16",
        "ppo_policy sees 0 complete checkpoints",
        "ppo_policy save_checkpoint 1",
        "ppo_policy offload grads optimizer",
        "policy wake_weights",
    ]


@pytest.mark.parametrize("episode", [1, 2])
@pytest.mark.parametrize("job_name", ["colocated_job", "job_of_five"])
def test_what_reaches_the_trainers_is_what_the_formulas_say(request, job_name, episode):
    job = request.getfixturevalue(job_name)
    batch, _ = whole_batch(job, "ppo_policy", episode)
    mask = batch["loss_mask"][:, 1:]
    assert mask.sum(1).unique().tolist() == [1, 2, 3, 4, 5]

    rewards = ((batch["all_tokens"] == GOOD_TOKEN) * batch["loss_mask"]).sum(1) / mask.sum(1)
    assert (rewards > CLIP_REWARD).any()
    kl = (batch["logprobs"] - reference_logprobs(batch)) * mask
    of_tokens = token_rewards(
        rewards, kl, mask, kl_coef=job.history[episode]["rollout/kl_coef"], clip=CLIP_REWARD
    )
    advantages, returns = gae(of_tokens, batch["values"], mask, gamma=GAMMA, lam=LAM)
    torch.testing.assert_close(batch["returns"], returns)
    torch.testing.assert_close(
        batch["advantages"], whiten(advantages, mask, moments(advantages, mask))
    )
    assert "ref_logprobs" not in batch  # the loss has no second KL penalty


class EngineWithoutRanks(RLHFEngine):
    """Its value model says one everywhere, its reference half."""

    def forward(self, module, batch, episode):
        ones = torch.ones_like(batch["loss_mask"][:, 1:])
        return {"values": ones, "ref_logprobs": -0.5 * ones}


def test_rollouts_without_logprobs_are_enough_without_a_reference(tmp_path):
    def prepared(reference, *keys, **columns):
        overrides = [f"models.ppo_policy.model_args.{key}" for key in keys]
        session.init(str(write_job(tmp_path)), overrides)
        names = ("policy", "reference", "reward", "value", "ppo_policy", "ppo_value")
        modules = {name: BaseModule(name) for name in names}
        if not reference:
            modules["reference"] = None
        batch = {"loss_mask": torch.tensor([[0.0, 1, 1], [0, 1, 1]]), "rewards": torch.ones(2)}
        return EngineWithoutRanks(*modules.values()).prepare(batch | columns, episode=1)[0]

    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    whole = prepared(False, "init_kl_coef=0.0", logprobs=logprobs)
    bare = prepared(False, "init_kl_coef=0.0")
    assert torch.equal(bare["returns"], whole["returns"])
    for reference, key, needed_by in (
        (True, "init_kl_coef=0.1", "the KL penalty of the rewards"),
        (True, "tis_imp_ratio_cap=2.0", "tis_imp_ratio_cap"),
    ):
        with pytest.raises(ValueError, match=f"must return 'logprobs', which {needed_by} needs"):
            prepared(reference, key)


@pytest.mark.parametrize("episode", [1, 2])
@pytest.mark.parametrize("job_name", ["colocated_job", "job_of_five"])
def test_values_are_those_of_the_weights_that_their_training_starts_from(
    request, job_name, episode
):
    job = request.getfixturevalue(job_name)
    batch, scores = whole_batch(job, "ppo_value", episode)
    of_policy, _ = whole_batch(job, "ppo_policy", episode)

    assert batch["values"].count_nonzero() > NUM_SAMPLES
    torch.testing.assert_close(batch["values"], predicted_values(scores, batch))
    for key in ("all_tokens", "values", "returns"):
        assert torch.equal(batch[key], of_policy[key]), key


def test_the_value_model_learns_and_so_do_the_metrics_say(colocated_job):
    _, first, second = colocated_job.history

    _, before = whole_batch(colocated_job, "ppo_value", 1)
    batch, after = whole_batch(colocated_job, "ppo_value", 2)
    assert not torch.equal(before, after)
    assert second["ppo_value/loss"] < first["ppo_value/loss"]
    num_tokens = batch["loss_mask"].sum()
    for name in ("returns", "values"):
        expected = (batch[name].sum() / num_tokens).item()
        assert second[f"rollout/{name[:-1]}_mean"] == pytest.approx(expected)
    for name in (
        "train/loss", "train/logprob_abs_diff_mean", "rollout/reward_mean",
        "rollout/kl_to_reference", "rollout/weight_version", "sync/weight_version", "sync/bytes",
        "time/reference_s", "time/value_s", "time/train_s", "time/sync_s", "time/episode_s",
    ):  # fmt: skip
        assert name in second, name
    assert "ppo_value/logprob_abs_diff_mean" not in second


def test_the_kl_coefficient_follows_its_target(colocated_job):
    _, first, second = colocated_job.history
    batch, _ = whole_batch(colocated_job, "ppo_policy", 1)
    mask = batch["loss_mask"][:, 1:]
    kl = ((batch["logprobs"] - reference_logprobs(batch)) * mask).sum(1).mean().item()

    assert kl > 1.2 * TARGET  # so the error is clipped to 0.2
    assert first["rollout/kl_to_reference"] == pytest.approx(kl, rel=1e-5)
    assert first["rollout/kl_coef"] == KL_COEF
    assert second["rollout/kl_coef"] == pytest.approx(KL_COEF * (1 + 0.2 * NUM_SAMPLES / HORIZON))


def test_a_resumed_job_goes_on_as_if_it_had_not_been_interrupted(job_of_five):
    *_, second = job_of_five.history
    state = load_state(job_of_five.run_dir / "checkpoints" / "driver", 1)
    assert state.engine == {"num_samples": 16, "kl": {"coef": second["rollout/kl_coef"]}}
    assert second["rollout/kl_coef"] != KL_COEF

    resumed = make_engine(
        job_of_five.path,
        "runtime.load_data_checkpoint_iteration=1",
        value=False,
        value_trainer=ValueTrainerInReverse,
    ).learn()

    assert [line["episode"] for line in resumed] == [2]
    assert without_times(resumed[0]) == without_times(second)


def test_a_coefficient_that_is_not_to_move_stays(tmp_path):
    fixed = make_engine(write_job(tmp_path), "models.ppo_policy.model_args.fix_kl_coef=True")

    fixed.kl.update(1000.0, NUM_SAMPLES)

    assert fixed.kl.coef == KL_COEF


def test_a_kl_penalty_without_a_reference_is_refused(tmp_path):
    session.init(str(write_job(tmp_path)))
    others = ToyReward("reward"), ToyValue("value"), ToyTrainer("ppo_policy")

    with pytest.raises(ValueError, match="ppo_policy: init_kl_coef=0.5 .* give RLHFEngine one"):
        RLHFEngine(UnevenPolicy("policy"), None, *others, ToyValueTrainer("ppo_value"))


def test_a_value_model_that_lags_behind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="models.value: sync_frequency=2 must be 1"):
        make_engine(write_job(tmp_path), "models.value.sync_frequency=2")


def test_each_trainer_must_be_able_to_spread_an_optimizer_step(tmp_path):
    sizes = ["runtime.sample_per_episode=10", "runtime.train_micro_batch_size=1"]
    odd = [*sizes, "runtime.train_global_batch_size=3", "models.ppo_value.num_gpu=3"]

    with pytest.raises(ValueError, match="1 of the episode's 10 samples .* 3 data parallel ranks"):
        make_engine(write_job(tmp_path), *odd)


def whole_batch(job, name, episode):
    """An episode's rows of all ranks, in the order in which they were sampled; scores before it."""
    rows_of_ranks, scores = rows_trained_on(job.run_dir, name, episode)
    batch = concat(rows_of_ranks)
    assert sorted(batch["sample_index"].tolist()) == list(
        range(NUM_SAMPLES * (episode - 1), NUM_SAMPLES * episode)
    )
    return select(batch, batch["sample_index"].argsort()), scores


def without_times(metrics):
    clocks = ("time/", "sync/seconds", "rollout/tokens_per_s")
    return {name: value for name, value in metrics.items() if not name.startswith(clocks)}
