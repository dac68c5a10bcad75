"""Is a key that an algorithm does not read, or cannot follow, told before anything starts?"""

import logging

import pytest
import yaml

from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.preference_module import PreferenceModule
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.grpo_engine import GRPOEngine
from chatlearn_vllm.runtime.online_dpo_engine import OnlineDPOEngine
from chatlearn_vllm.runtime.rlhf_engine import RLHFEngine

TRAINER = "models.policy_trainer.model_args."
DR_GRPO = f"{TRAINER}loss_agg=seq-mean-token-sum-norm"
ONE_RESPONSE = "models.policy.model_args.num_inference_per_prompt=1"
RAW = "models.policy.model_args.logprobs_mode=raw_logprobs"
COOLER = f"{TRAINER}temperature=0.7"


@pytest.fixture
def path(tmp_path):
    sampling = {"seq_length": 16, "max_new_tokens": 8, "num_inference_per_prompt": 2}
    trained = {"num_gpu": 1, "trainable": True}
    models = {
        "policy": {"num_gpu": 1, "model_args": sampling},
        "reference": {"num_gpu": 1},
        "reward": {"num_cpu": 1},
        "policy_trainer": {**trained, "model_args": {"init_kl_coef": 0.1}},
        "value": {"num_gpu": 1},
        "value_trainer": trained,
    }
    runtime = {"sample_per_episode": 16, "train_global_batch_size": 8, "output_dir": str(tmp_path)}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"models": models, "runtime": runtime}))
    return tmp_path / "job.yaml"


def grpo(path, *overrides):
    session.init(str(path), overrides)
    return GRPOEngine(*map(BaseModule, ("policy", "reference", "reward", "policy_trainer")))


def ppo(path, *overrides):
    session.init(str(path), overrides)
    names = ("policy", "reference", "reward", "value", "policy_trainer", "value_trainer")
    return RLHFEngine(*map(BaseModule, names))


class PairTrainer(PreferenceModule):
    def model_provider(self, *args, **kwargs):
        raise AssertionError("nothing starts")


def online_dpo(path, *overrides):
    session.init(str(path), overrides)
    frozen = map(BaseModule, ("policy", "reference", "reward"))
    return OnlineDPOEngine(*frozen, PairTrainer("policy_trainer"))


@pytest.mark.parametrize(
    ("engine", "overrides", "message"),
    [
        (grpo, [ONE_RESPONSE], "models.policy: num_inference_per_prompt=1 gives one response"),
        (grpo, [ONE_RESPONSE, f"{TRAINER}advantage_estimator=rloo"], "estimator=rloo compares"),
        (
            grpo,
            [f"{TRAINER}advantage_estimator=reinforce++", f"{TRAINER}ratio_level=sequence"],
            "ratio_level=sequence needs one advantage per response",
        ),
        (
            grpo,
            ["runtime.max_rollout_round=2", "runtime.dynamic_sampling=True"],
            "max_rollout_round=2 and runtime.dynamic_sampling: True both decide",
        ),
        (
            grpo,
            ["runtime.max_rollout_round=2", "models.policy.model_args.repetition_penalty=1.1"],
            "models.policy: .*'repetition_penalty=1.1'.* would count anew",
        ),
        (grpo, [f"{TRAINER}overlong_buffer_len=9"], "len=9 must be at most max_new_tokens=8 of"),
        (
            grpo,
            [DR_GRPO],
            "models.policy_trainer: loss_agg=seq-mean-token-sum-norm divides by its "
            "max_new_tokens=512, which must be that of models.policy, 8$",
        ),
        (
            ppo,
            [DR_GRPO],
            "policy_trainer: .* max_new_tokens=512, which must be .* models.policy, 8",
        ),
        (
            ppo,
            ["models.value_trainer.model_args.loss_agg=seq-mean-token-sum-norm"],
            "models.value_trainer: .* max_new_tokens=512, which must be that of models.policy, 8",
        ),
        (
            grpo,
            [RAW, COOLER, f"{TRAINER}tis_imp_ratio_cap=2"],
            "models.policy: logprobs_mode='raw_logprobs', which is temperature 1, while the "
            "trainer's is 0.7: tis_imp_ratio_cap=2 of models.policy_trainer would compare",
        ),
        (
            grpo,
            [RAW, COOLER, f"{TRAINER}advantage_estimator=reinforce++"],
            "the KL penalty of the rewards of models.policy_trainer would compare the two",
        ),
        (
            ppo,
            [RAW, COOLER, f"{TRAINER}tis_imp_ratio_cap=2"],
            "tis_imp_ratio_cap=2 and the KL penalty of the rewards of models.policy_trainer would",
        ),
        (ppo, ["runtime.dynamic_sampling=True"], "dynamic_sampling has no effect in RLHFEngine"),
        (ppo, [f"{TRAINER}overlong_buffer_len=4"], "overlong_buffer_len=4 has no effect in RLHF"),
        (ppo, [f"{TRAINER}ratio_level=sequence"], "ratio_level=sequence needs one .* PPO has one"),
        (
            ppo,
            [f"{TRAINER}fix_kl_coef=False", f"{TRAINER}horizon=3"],
            "horizon=3 must be more than a fifth of runtime.sample_per_episode=16",
        ),
        (online_dpo, ["runtime.dynamic_sampling=True"], "no effect in OnlineDPOEngine, only in"),
        (online_dpo, [f"{TRAINER}advantage_estimator=rloo"], "estimator=rloo has no effect in On"),
        (
            online_dpo,
            [f"{TRAINER}use_ipo=True", f"{TRAINER}label_smoothing=0.1"],
            "label_smoothing=0.1 is of DPO's loss; set it to 0 with use_ipo: True",
        ),
    ],
)
def test_keys_that_do_not_fit_the_algorithm_are_refused(path, engine, overrides, message):
    with pytest.raises(ValueError, match=message):
        engine(path, *overrides)


def test_models_in_the_wrong_order_are_told(path):
    session.init(str(path))
    roles = map(BaseModule, ("policy_trainer", "reference", "reward", "policy"))
    with pytest.raises(ValueError) as error:
        GRPOEngine(*roles)
    assert str(error.value).splitlines() == [
        "models.policy: GRPOEngine trains it; set trainable: True",
        "models.policy_trainer: trainable: True, but GRPOEngine does not train it; set it to False",
        "or give GRPOEngine its models in the order of its arguments",
    ]


def test_a_path_is_no_data_set(path):
    with pytest.raises(ValueError, match=r"set_dataset\(load_prompts\('train.jsonl'\)\)"):
        grpo(path).set_dataset("train.jsonl")


def test_all_of_them_are_told_at_once(path):
    overrides = [ONE_RESPONSE, f"{TRAINER}overlong_buffer_len=9"]

    with pytest.raises(ValueError, match=r"^models.policy: .*\nmodels.policy_trainer: overlong"):
        grpo(path, *overrides)


def test_keys_that_fit_are_taken(path):
    grpo(path, ONE_RESPONSE, f"{TRAINER}advantage_estimator=reinforce++")
    grpo(path, f"{TRAINER}overlong_buffer_len=8", f"{TRAINER}ratio_level=sequence")
    grpo(path, DR_GRPO, f"{TRAINER}max_new_tokens=8")
    grpo(path, RAW, COOLER)  # nothing of the algorithm reads them
    grpo(path, RAW, f"{TRAINER}tis_imp_ratio_cap=2")
    ppo(path, ONE_RESPONSE, f"{TRAINER}horizon=3")
    ppo(path, DR_GRPO, f"{TRAINER}max_new_tokens=8")
    ppo(path, f"{TRAINER}fix_kl_coef=False", f"{TRAINER}horizon=4")
    online_dpo(path, f"{TRAINER}label_smoothing=0.1")


CHANGED = {
    "cliprange": 0.3, "cliprange_high": 0.4, "dual_clip": 3.0, "ratio_level": "sequence",
    "tis_imp_ratio_cap": 2.0, "advantage_std": False, "init_kl_coef": 0.2, "kl_estimator": "k2",
    "fix_kl_coef": False, "target": 5.0, "horizon": 9000, "loss_agg": "seq-mean",
    "entropy_coef": 0.1, "gamma": 0.9, "lam": 0.9, "cliprange_value": 0.3, "cliprange_reward": 5.0,
    "overlong_penalty_factor": 0.5, "dpo_weight": 0.2, "use_ipo": True, "label_smoothing": 0.1,
}  # fmt: skip
"""Another value than the default for all keys but those that only GRPOEngine accepts."""
OF_LOSS = {
    "cliprange", "cliprange_high", "dual_clip", "ratio_level", "tis_imp_ratio_cap", "loss_agg",
    "entropy_coef", "init_kl_coef",
}  # fmt: skip
OF_GRPO = OF_LOSS | {"overlong_penalty_factor"}
OF_DPO = {"dpo_weight", "use_ipo", "label_smoothing"}
OF_REWARDS = {"fix_kl_coef", "target", "horizon", "gamma", "lam", "cliprange_reward"}
RLOO = f"{TRAINER}advantage_estimator=rloo"
REINFORCE = f"{TRAINER}advantage_estimator=reinforce++"


@pytest.mark.parametrize(
    ("engine", "model", "overrides", "title", "read", "refused"),
    [
        (grpo, "policy_trainer", [], "GRPOEngine", OF_GRPO | {"kl_estimator", "advantage_std"}, ""),
        (grpo, "policy_trainer", [RLOO], "GRPOEngine with rloo", OF_GRPO | {"kl_estimator"}, ""),
        (
            grpo,
            "policy_trainer",
            [REINFORCE],
            "GRPOEngine with reinforce++",
            OF_GRPO | {"gamma", "cliprange_reward"},
            "ratio_level",
        ),
        (online_dpo, "policy_trainer", [], "OnlineDPOEngine", OF_DPO, "label_smoothing"),
        (ppo, "policy_trainer", [], "RLHFEngine", OF_LOSS | OF_REWARDS, "ratio_level"),
        (ppo, "value_trainer", [], "RLHFEngine", {"cliprange_value", "loss_agg"}, ""),
    ],
)
def test_keys_that_the_engine_does_not_read_are_told(
    path, caplog, engine, model, overrides, title, read, refused
):
    given = {key: value for key, value in CHANGED.items() if key != refused}
    overrides = [*overrides, *(f"models.{model}.model_args.{k}={v}" for k, v in given.items())]
    caplog.set_level(logging.INFO)
    engine(path, *overrides)
    (message,) = [one for one in caplog.messages if f"models.{model}: no effect of" in one]
    unread = [f"{key}={value!r}" for key, value in given.items() if key not in read]
    start = f"models.{model}: no effect of {', '.join(unread)} in {title}; "
    assert message.startswith(start)


@pytest.mark.parametrize("engine", [grpo, ppo, online_dpo])
def test_defaults_that_the_engine_does_not_read_are_not_told(path, caplog, engine):
    caplog.set_level(logging.INFO)
    defaults = [f"{TRAINER}lam=0.95", f"{TRAINER}dpo_weight=0.1", f"{TRAINER}init_kl_coef=0"]
    engine(path, *defaults)
    assert not [one for one in caplog.messages if "no effect of" in one]


@pytest.mark.parametrize("engine", [grpo, ppo, online_dpo])
def test_a_reference_of_another_temperature_is_told(path, caplog, engine):
    caplog.set_level(logging.WARNING)
    engine(path)
    assert not caplog.messages
    engine(path, f"{TRAINER}temperature=0.7")
    (message,) = [one for one in caplog.messages if "models.reference" in one]
    assert message.startswith("models.reference has temperature=1 and models.policy_trainer 0.7")


@pytest.mark.parametrize(
    ("engine", "overrides", "is_told"),
    [(grpo, [], True), (grpo, [f"{TRAINER}tis_imp_ratio_cap=2"], False), (online_dpo, [], False)],
)
def test_old_tokens_are_told_where_their_age_can_be_corrected_for(
    path, caplog, engine, overrides, is_told
):
    caplog.set_level(logging.WARNING)
    engine(path, "runtime.max_rollout_round=3", *overrides)
    told = [one for one in caplog.messages if "of up to 2 weight versions ago" in one]
    assert len(told) == is_told


def test_a_kl_penalty_that_holds_nothing_back_is_told(path, caplog):
    caplog.set_level(logging.WARNING)
    k1 = f"{TRAINER}kl_estimator=k1"
    grpo(path, k1, f"{TRAINER}advantage_estimator=reinforce++")
    grpo(path, f"{TRAINER}kl_estimator=k2")
    assert not caplog.messages
    grpo(path, k1)
    assert "kl_estimator=k1 in a loss has a gradient of 0 on average" in caplog.text


def test_a_clip_range_of_tokens_is_told_where_ratios_are_of_responses(path, caplog):
    caplog.set_level(logging.WARNING)
    sequence = f"{TRAINER}ratio_level=sequence"
    grpo(path)
    grpo(path, sequence, f"{TRAINER}cliprange=3e-4", f"{TRAINER}cliprange_high=4e-4")
    assert not caplog.messages
    grpo(path, sequence)
    (message,) = caplog.messages
    assert message.startswith("models.policy_trainer: cliprange=0.2 is for ratios of tokens; with")


@pytest.mark.parametrize("engine", [grpo, ppo, online_dpo])
def test_keys_of_another_role_are_told(path, caplog, engine):
    caplog.set_level(logging.INFO)
    keys = ("sync_frequency=2", "reward_weight=0.5", "generation_batch_size=7")
    models = ("policy", "reward", "policy_trainer")
    kept = "models.policy.model_args.sleep_level=1"
    engine(path, kept, *(f"models.{model}.{key}" for model in models for key in keys))
    told = [one.partition(";")[0] for one in caplog.messages if "no effect of" in one]
    assert sorted(one for one in told if one.endswith(keys)) == [
        "models.policy: no effect of generation_batch_size=7",
        "models.policy: no effect of reward_weight=0.5",
        "models.policy_trainer: no effect of reward_weight=0.5",
        "models.policy_trainer: no effect of sync_frequency=2",
        "models.reward: no effect of sync_frequency=2",
    ]
    of = {"models.policy", "models.value"} if engine is ppo else {"models.policy"}
    (of_trainer,) = [one for one in caplog.messages if "policy_trainer: no effect of sync" in one]
    _, _, named = of_trainer.partition("it is of models that get weights: ")
    assert set(named.split(", ")) == of


def test_rows_of_a_pass_are_told_where_tokens_are_counted(path, caplog):
    caplog.set_level(logging.INFO)
    rows = "models.policy_trainer.generation_batch_size=7"
    online_dpo(path, rows)
    assert "generation_batch_size" not in caplog.text
    online_dpo(path, rows, f"{TRAINER}max_tokens_per_micro_batch=4096")
    assert "generation_batch_size=7; max_tokens_per_micro_batch replaces it" in caplog.text
