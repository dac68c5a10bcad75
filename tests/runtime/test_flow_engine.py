"""Do flows run as they read? Toy models on real Ray; the page's example against GRPOEngine."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import chatlearn_vllm
from chatlearn_vllm.job.flow import FlowError, apply
from chatlearn_vllm.modules.megatron_module import MegatronModule
from chatlearn_vllm.modules.preference_module import PreferenceModule
from chatlearn_vllm.modules.value_module import ValueModule
from chatlearn_vllm.modules.vllm_module import VLLMModule
from chatlearn_vllm.observability.metrics import read_metrics
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.eval_engine import EvalEngine
from chatlearn_vllm.runtime.evaluator import Evaluator
from chatlearn_vllm.runtime.flow_engine import Engine, Environment, TakesWeights, Trainer
from chatlearn_vllm.runtime.flow_steps import AnswersPrompts
from chatlearn_vllm.runtime.grpo_engine import GRPOEngine
from tests.helpers.toy_modules import (
    GOOD_TOKEN,
    PROMPTS,
    KeepsRows,
    ToyModule,
    ToyPolicy,
    ToyReference,
    ToyReward,
    ToyTrainer,
    ToyValue,
    ToyValueTrainer,
    UnevenPolicy,
    calls_of,
    predicted_values,
    rows_trained_on,
    write_job,
)

PAGE = Path(__file__).parents[2] / "docs" / "flows.md"
ONE_RANK_EACH = [f"models.{name}.num_gpu=1" for name in ("policy", "policy_trainer", "reference")]


def grpo_modules(path, *overrides):
    session.init(str(path), [*ONE_RANK_EACH, "runtime.save_episode_interval=1", *overrides])
    return {
        "policy": ToyPolicy("policy"),
        "reference": ToyReference("reference"),
        "reward": ToyReward("reward"),
        "policy_trainer": ToyTrainer("policy_trainer"),
    }


def run_the_page(modules):
    """What the page's first example does, with the function of its second one."""
    example, function = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[:2]
    names = {name: getattr(chatlearn_vllm, name) for name in chatlearn_vllm.__all__}
    script = {**names, **modules, "prompts": PROMPTS}
    exec(function, script)
    exec(example, script)
    return script["history"], script["engine"].run_dir


def test_the_page_s_flow_gives_the_numbers_of_grpo_also_when_it_is_interrupted(
    existing_cluster, tmp_path
):
    (tmp_path / "flow").mkdir()
    path = write_job(tmp_path, kl=0.1)
    engine = GRPOEngine(**grpo_modules(path))
    expected = engine.set_dataset(PROMPTS).learn()

    path = write_job(tmp_path / "flow", kl=0.1)
    first, run_dir = run_the_page(grpo_modules(path, "runtime.num_episode=1"))
    second, _ = run_the_page(grpo_modules(path))

    assert [without_times(line) for line in first + second] == [*map(without_times, expected)]
    assert [line["episode"] for line in second] == [2]
    # Scorers come in the order of the flow; the rest is in the order of every episode.
    in_order = calls_of(engine.run_dir)
    assert sorted(calls_of(run_dir)[: in_order.index("policy_trainer train 32")]) == sorted(
        in_order[: in_order.index("policy_trainer train 32")]
    )


class Trained(KeepsRows, ToyTrainer):
    pass


class TrainedValue(KeepsRows, ToyValueTrainer):
    pass


class Politeness(ToyModule):
    """Scores in evaluations only."""

    def forward_step(self, data, iteration=0):
        self.note("forward_step")
        return {"politeness": torch.tensor([float("3" in text) for text in data["str_outputs"]])}


class TellingEvaluator(Evaluator):
    def post_process_func(self, results, eval_info):
        (answers,), (scored,) = results["policy"], results["politeness"]
        assert "politeness" not in answers
        return {"eval/politeness": scored["politeness"].mean().item(), **eval_info}


def write_actor_critic_job(directory, **runtime):
    frozen = {"num_gpu": 1, "free_memory": True}
    trained = {**frozen, "trainable": True, "model_args": {"lr": 0.5}}
    sampling = {"seq_length": 8, "max_new_tokens": 6, "num_inference_per_prompt": 2}
    models = {
        "policy": {**frozen, "model_args": sampling},
        "reward": {"num_cpu": 1},
        "politeness": {"num_cpu": 1},
        "value": frozen,
        "ppo_policy": trained,
        "ppo_value": trained,
    }
    settings = {
        "colocation": ["policy,value,ppo_policy,ppo_value"], "num_episode": 2,
        "sample_per_episode": 16, "train_micro_batch_size": 4, "train_global_batch_size": 8,
        "eval_episode_interval": 1, "output_dir": str(directory),
    }  # fmt: skip
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump({"models": models, "runtime": {**settings, **runtime}}))
    return path


def actor_critic_modules():
    return SimpleNamespace(
        policy=UnevenPolicy("policy"),
        reward=ToyReward("reward"),
        politeness=Politeness("politeness"),
        value=ToyValue("value"),
        ppo_policy=Trained("ppo_policy"),
        ppo_value=TrainedValue("ppo_value"),
    )


def better_half(batch):
    """Advantages over the values; the better half of the rows."""
    mask = batch["loss_mask"][:, 1:]
    batch["returns"] = batch["rewards"][:, None] * mask
    batch["advantages"] = batch["returns"] - batch["values"]
    rows = batch["rewards"].argsort(descending=True, stable=True)[:8]
    chosen = chatlearn_vllm.data.batch.select(batch, rows.sort().values)
    return chosen, {"rollout/value_mean": batch["values"].mean().item()}


def actor_critic_flows(models, *, trained_model_scores=False):
    def env_flow(prompts):
        samples = models.policy.forward_step(prompts)
        scored = models.reward.forward_step(samples)
        scores = [scored, models.value.forward_step(samples)]
        if trained_model_scores:  # were its values not those of `value`, they would not merge
            scores.append(models.ppo_value.forward_step(samples))
        return apply(better_half, *scores)

    def trainer_flow(batch):
        models.ppo_policy.train_step(batch)
        models.ppo_value.train_step(batch)

    def eval_flow(prompts):
        answers = models.policy.eval_forward(prompts)
        return models.reward.eval_forward(answers), models.politeness.eval_forward(answers)

    return env_flow, trainer_flow, eval_flow


@pytest.fixture(scope="module")
def actor_critic(shared_cluster, tmp_path_factory):
    """Two models trained on half of the samples; evaluated with a model of its own."""
    session.init(str(write_actor_critic_job(tmp_path_factory.mktemp("actor_critic"))))
    models = actor_critic_modules()
    env_flow, trainer_flow, eval_flow = actor_critic_flows(models, trained_model_scores=True)
    engine = Engine(
        Environment(env_flow),
        Trainer(trainer_flow),
        TellingEvaluator(eval_flow, prompts=PROMPTS[:4]),
    )
    engine.set_parameter_sync(models.ppo_value, models.value)
    engine.set_parameter_sync(models.ppo_policy, models.policy)
    history = engine.set_dataset(PROMPTS).learn()
    return SimpleNamespace(history=history[1:], run_dir=engine.run_dir)


def test_the_model_that_feeds_the_policy_is_trained_last_and_scorers_take_turns(actor_critic):
    calls = calls_of(actor_critic.run_dir)

    first = calls.index("policy generate train 0")
    streamed = [call for call in calls if call.startswith("reward")]  # while the policy generates
    others = [call for call in calls[first:] if not call.startswith(("reward", "policy generate"))]
    assert others[:25] == [
        "policy sleep",
        "value onload",
        "value forward_step 16",
        "value offload",
        "ppo_value onload weights",
        "ppo_value forward_step 16",
        "ppo_value offload weights",
        "ppo_value onload weights grads optimizer",
        "ppo_value train 8",
        "ppo_value offload grads optimizer",
        "value onload",
        "ppo_value export_weights",
        "value import_weights",
        "value finish_weight_sync 2",
        "value offload",
        "ppo_value offload weights",
        "ppo_policy onload weights grads optimizer",
        "ppo_policy train 8",
        "ppo_policy offload grads optimizer",
        "policy wake_weights",
        "ppo_policy export_weights",
        "policy import_weights",
        "policy finish_weight_sync 2",
        "ppo_policy offload weights",
        "policy wake_kv_cache",
    ]
    assert sum(int(call.split()[-1]) for call in streamed if "forward" in call) == 2 * (16 + 4)


def test_both_models_are_trained_on_the_rows_that_the_flow_returns(actor_critic):
    (of_policy,), _ = rows_trained_on(actor_critic.run_dir, "ppo_policy", 2)
    (of_value,), scores = rows_trained_on(actor_critic.run_dir, "ppo_value", 2)

    assert of_policy["sample_index"].tolist() == of_value["sample_index"].tolist()
    assert len(of_value["sample_index"]) == 8 and of_value["sample_index"].min() >= 16
    # The values of episode 2 are those of the weights that were trained in episode 1.
    assert of_value["values"].count_nonzero() > 0
    torch.testing.assert_close(of_value["values"], predicted_values(scores, of_value))
    assert set(of_policy["weight_version"].tolist()) == {2}


def test_metrics_are_those_of_all_samples_and_of_the_flow_s_own_functions(actor_critic):
    for episode, metrics in enumerate(actor_critic.history, start=1):
        (rows,), _ = rows_trained_on(actor_critic.run_dir, "ppo_policy", episode)
        assert metrics["rollout/num_samples"] == 16
        assert metrics["rollout/reward_mean"] < rows["rewards"].mean().item()
        assert "rollout/value_mean" in metrics and "ppo_value/loss" in metrics
        assert {"time/value_s", "time/reward_s", "time/apply_s", "time/train_s"} <= metrics.keys()


def test_an_evaluation_tells_its_metrics_in_files_and_in_a_table(actor_critic):
    first, second = actor_critic.history
    directory = actor_critic.run_dir / "eval"

    assert (first["episode_iteration"], first["train_iteration"]) == (1, 2)
    assert (second["episode_iteration"], second["train_iteration"]) == (2, 4)
    samples = [json.loads(line) for line in (directory / "episode_000002.jsonl").open()]
    assert len(samples) == second["eval/num_samples"] == 4
    politeness = sum(sample["politeness"] for sample in samples) / 4
    assert second["eval/politeness"] == pytest.approx(politeness)
    lines = (directory / "episode_000002.txt").read_text().splitlines()
    change = second["eval/reward_mean"] - first["eval/reward_mean"]
    assert lines[1].split() == [
        "eval/reward_mean", f"{second['eval/reward_mean']:.4g}", f"{change:+.4g}",
    ]  # fmt: skip
    heading = lines.index("") + 1
    assert lines[heading].split() == ["prompt", "answer", "reward"]
    assert lines[heading + 1].startswith(f"question 0  {samples[0]['str_outputs']}")
    no_change_before_the_first = (directory / "episode_000001.txt").read_text().splitlines()[1]
    assert no_change_before_the_first.split()[-1] == "-"


class KnowingPolicy(ToyPolicy):
    """Has weights of its own: it prefers the good token."""

    def model_setup(self):
        super().model_setup()
        self.scores = torch.zeros(self.width)
        self.scores[GOOD_TOKEN] = 4.0
        self.version = 0


def test_a_policy_with_weights_of_its_own_is_evaluated_without_a_trainer(
    existing_cluster, tmp_path
):
    path = write_actor_critic_job(tmp_path, colocation=["policy,value"])
    session.init(str(path))
    policy, reward, value = KnowingPolicy("policy"), ToyReward("reward"), Politeness("value")

    def digits(batch):
        lengths = torch.tensor([sum(map(str.isdigit, text)) for text in batch["str_outputs"]])
        return {"digits": lengths}, {"eval/digits_mean": lengths.float().mean().item()}

    def eval_flow(prompts):
        answers = value.eval_forward(policy.eval_forward(prompts))
        return reward.eval_forward(apply(digits, answers))

    engine = EvalEngine(eval_flow).set_dataset(PROMPTS[:6])
    metrics = engine.eval(cur_iter=3, train_iteration=12)

    assert metrics["eval/num_samples"] == 6
    assert metrics["eval/reward_mean"] > 0.7  # 0.89 of all tokens are expected to be good
    assert metrics["eval/digits_mean"] == 6.0
    assert metrics["time/eval_s"] > 0
    assert calls_of(engine.run_dir) == [
        "value model_setup",
        "value offload",
        "reward model_setup",
        "policy model_setup",
        "policy generate eval 0",
        "value onload",
        "value forward_step",
        "value offload",
        "reward forward_step 6",
        *(f"{name} shutdown" for name in ("value", "reward", "policy")),
    ]
    assert read_metrics(engine.run_dir / "eval" / "metrics.jsonl") == [{"episode": 3, **metrics}]
    assert len((engine.run_dir / "eval" / "episode_000003.jsonl").read_text().splitlines()) == 6
    assert (engine.run_dir / "eval" / "episode_000003.txt").is_file()


# ---- what is refused before anything starts ---------------------------------------------------


@pytest.fixture
def models(tmp_path):
    session.init(str(write_actor_critic_job(tmp_path)))
    return actor_critic_modules()


def refused(message, make, error=FlowError):
    with pytest.raises(error, match=message):
        make()


def test_the_package_s_own_classes_can_play_the_roles_that_are_meant_for_them():
    assert issubclass(VLLMModule, AnswersPrompts) and issubclass(VLLMModule, TakesWeights)
    assert issubclass(ValueModule, TakesWeights)
    assert not issubclass(MegatronModule, AnswersPrompts | TakesWeights)


def test_a_trainer_s_flow_only_trains(models):
    policy, ppo_value = models.policy, models.ppo_value
    for message, flow in {
        "<lambda> trains no model": lambda batch: None,
        "calls ppo_value.forward_step; in this place": lambda batch: ppo_value.forward_step(batch),
        "models.policy: set its trainable: True": lambda batch: policy.train_step(batch),
        "len is not train_step on": lambda batch: ppo_value.train_step(apply(len, batch)),
        "trains a model twice": lambda batch: [ppo_value.train_step(batch) for _ in range(2)],
    }.items():
        refused(message, lambda flow=flow: Trainer(flow))

    class Pairs(PreferenceModule):
        def model_provider(self, *args, **kwargs):
            raise AssertionError("only ranks are asked")

    pairs = Pairs("ppo_policy")
    refused("pairs that have to stay together", lambda: Trainer(lambda b: pairs.train_step(b)))


def test_an_environment_s_flow_only_scores(models):
    def env_flow(prompts):
        return models.reward.eval_forward(models.policy.forward_step(prompts))

    refused("calls reward.eval_forward; in this place", lambda: Environment(env_flow))
    refused("env_flow returns nothing", lambda: Environment(returning_nothing(models)))


def returning_nothing(models):
    def env_flow(prompts):
        models.policy.forward_step(prompts)

    return env_flow


def make_engine(models, *pairs):
    env_flow, trainer_flow, _ = actor_critic_flows(models)
    engine = Engine(Environment(env_flow), Trainer(trainer_flow)).set_dataset(PROMPTS)
    for source, target in pairs:
        engine.set_parameter_sync(getattr(models, source), getattr(models, target))
    return engine


def test_with_two_trained_models_whose_weights_go_where_has_to_be_said(models):
    refused(
        "whose weights does models.policy get, those of ppo_policy or ppo_value",
        make_engine(models).learn,
        ValueError,
    )
    refused(
        "models.ppo_value is trained, but nobody gets its weights",
        make_engine(models, ("ppo_policy", "policy")).learn,
        ValueError,
    )


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("value", "policy")], "trainer_flow trains ppo_policy, ppo_value, not value"),
        ([("ppo_policy", "politeness")], "models.politeness is no frozen model of the flows"),
        ([("ppo_policy", "ppo_value")], "models.ppo_value is no frozen model of the flows"),
        ([("ppo_value", "reward")], "ToyReward takes no weights"),
        ([("ppo_value", "value"), ("ppo_policy", "value")], "are a pair already"),
    ],
)
def test_weights_go_from_a_trained_model_to_one_that_takes_them(models, pairs, message):
    refused(message, lambda: make_engine(models, *pairs), ValueError)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.reward.reward_weight=0.5", "models.reward: reward_weight=0.5 has no effect"),
        ("runtime.dynamic_sampling=True", "runtime.dynamic_sampling has no effect in a flow"),
    ],
)
def test_keys_of_other_engines_are_refused(tmp_path, override, message):
    session.init(str(write_actor_critic_job(tmp_path)), [override])
    refused(message, lambda: make_engine(actor_critic_modules()), ValueError)


def test_an_engine_takes_flows_in_their_classes_and_order(models):
    env_flow, trainer_flow, eval_flow = actor_critic_flows(models)
    environment, trainer = Environment(env_flow), Trainer(trainer_flow)
    refused("in this form and order, got a function", lambda: Engine(env_flow, trainer))
    refused("in this form and order, got a Trainer", lambda: Engine(trainer, environment))
    refused("got a function", lambda: Engine(environment, trainer, eval_flow))


def test_flows_of_an_engine_are_of_one_job(models, tmp_path):
    env_flow, _, _ = actor_critic_flows(models)
    session.init(str(tmp_path / "job.yaml"))
    trainer = Trainer(actor_critic_flows(actor_critic_modules())[1])
    refused("make all modules after one init", lambda: Engine(Environment(env_flow), trainer))


def test_an_evaluation_has_prompts_and_calls_frozen_models_only(models):
    _, _, eval_flow = actor_critic_flows(models)
    policy, ppo_value = models.policy, models.ppo_value
    refused("at least one prompt", lambda: Evaluator(eval_flow, prompts=[]), ValueError)
    refused("no evaluation data", Evaluator(eval_flow).require_prompts, ValueError)
    refused("a policy, a reward module and prompts, or a flow", lambda: Evaluator(policy))
    refused(r"Evaluator\(eval_flow, prompts=", lambda: Evaluator(eval_flow, PROMPTS))
    refused("in this place a flow calls eval_forward", lambda: Evaluator(policy.forward_step))
    refused(
        "calls models.ppo_value, which is trainable",
        lambda: Evaluator(lambda p: ppo_value.eval_forward(policy.eval_forward(p))),
    )
    refused("a flow or an evaluator, one of the two", EvalEngine)
    engine = make_engine(models)
    refused(
        "the evaluator's module 'politeness' is not one of this engine's",
        lambda: engine.set_evaluator(Evaluator(eval_flow)),
        ValueError,
    )


def without_times(metrics):
    clocks = ("time/", "sync/seconds", "rollout/tokens_per_s")
    return {name: value for name, value in metrics.items() if not name.startswith(clocks)}
