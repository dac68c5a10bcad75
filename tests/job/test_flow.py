"""Is a flow's function recorded as it reads, and are mistakes in it explained?"""

import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
from ray import cloudpickle

from chatlearn_vllm.job.flow import FlowError, Handle, apply, record
from chatlearn_vllm.modules.base import BaseModule

JOB = SimpleNamespace(path="job.yaml", models=dict.fromkeys(("policy", "reward", "style", "ref")))


class Scorer(BaseModule):
    def forward_step(self, data, iteration=0):
        return {"rewards": data["rows"] + iteration}


class TwoStepScorer(Scorer):
    def forward_step(self, data, iteration=0):
        return {**super().forward_step(data, iteration), "seen": True}


class CountsCalls:
    """A class to mix in that is no module."""

    num_calls = 0

    def forward_step(self, data, iteration=0):
        self.num_calls += 1
        return super().forward_step({**data, "rows": 10 * data["rows"]}, iteration)


class CountingScorer(CountsCalls, Scorer):
    pass


class Aliased(Scorer):
    eval_forward = Scorer.forward_step


policy, reward, style = (Scorer(name, JOB) for name in ("policy", "reward", "style"))
reference = TwoStepScorer("ref", JOB)


def advantages(batch):
    return {"advantages": batch["rewards"]}


def described(flow):
    """`call(inputs)` of each call, in the words of the function."""
    names = {None: "prompts"} | {call: str(call) for call in flow.calls}
    return [
        f"{call}({', '.join(names[one.call] for one in call.inputs)})" for call in flow.calls
    ], [names[one.call] for one in flow.returned]


def test_calls_are_noted_in_order_with_their_inputs():
    def env_flow(prompts):
        samples = policy.forward_step(prompts)
        ref = reference.forward_step(samples)
        scored = reward.forward_step(samples, ref)
        return apply(advantages, scored, ref), samples

    flow = record(env_flow)

    assert flow.name == "env_flow"
    assert described(flow) == (
        [
            "policy.forward_step(prompts)",
            "ref.forward_step(policy.forward_step)",
            "reward.forward_step(policy.forward_step, ref.forward_step)",
            "advantages(reward.forward_step, ref.forward_step)",
        ],
        ["advantages", "policy.forward_step"],
    )
    assert flow.modules == (policy, reference, reward)
    assert [str(call) for call in flow.takers()] == ["policy.forward_step"]
    assert flow.calls[-1].function is advantages


def test_what_a_flow_decides_by_ordinary_values_is_decided_when_it_is_recorded():
    rewards, with_reference = [reward, style, reward], False

    def env_flow(prompts):
        samples = policy.forward_step(prompts)
        if with_reference:
            samples = reference.forward_step(samples)
        return [one.forward_step(data=samples) for one in rewards]

    calls, returned = described(record(env_flow))

    assert calls[1:] == [
        "reward.forward_step(policy.forward_step)",
        "style.forward_step(policy.forward_step)",
        "reward.forward_step(policy.forward_step)",
    ]
    assert returned == ["reward.forward_step", "style.forward_step", "reward.forward_step"]


def test_without_a_handle_a_module_runs_as_it_did():
    assert reward.forward_step({"rows": 2}, 5) == {"rewards": 7}
    assert reward.forward_step(data={"rows": 2}, iteration=1) == {"rewards": 3}
    assert reference.forward_step({"rows": 2}) == {"rewards": 2, "seen": True}
    assert reward.eval_forward({"rows": 4}) == {"rewards": 4}
    with pytest.raises(NotImplementedError, match="Scorer has no train_step"):
        reward.train_step([{}])


def test_a_mixed_in_method_runs_on_data_and_not_on_handles():
    counting = CountingScorer("reward", JOB)

    flow = record(lambda prompts: counting.forward_step(prompts))

    assert counting.num_calls == 0
    assert [str(call) for call in flow.calls] == ["reward.forward_step"]
    assert counting.forward_step({"rows": 1}) == {"rewards": 10}
    assert counting.num_calls == 1


def test_a_method_under_another_name_is_noted_under_that_name():
    aliased = Aliased("reward", JOB)
    (call,) = record(lambda prompts: aliased.eval_forward(prompts)).calls
    assert str(call) == "reward.eval_forward"


def test_a_class_of_the_users_script_still_runs_on_a_rank(tmp_path):
    script = types.ModuleType("__main__")
    script.BaseModule = BaseModule
    exec(
        "class Own(BaseModule):\n"
        "    def forward_step(self, data, iteration=0):\n"
        "        return data + iteration\n",
        script.__dict__,
    )
    (tmp_path / "class.pkl").write_bytes(cloudpickle.dumps((script.Own, JOB)))

    rank = (
        "import pickle, sys; module_class, job = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(module_class('reward', job=job).forward_step(1, 2))"
    )
    arguments = [sys.executable, "-c", rank, str(tmp_path / "class.pkl")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


def uses_of_a_handle():
    return {
        "asks whether it is true": lambda samples: samples or None,
        "loops over": lambda samples: [row for row in samples],
        "asks for the length": lambda samples: len(samples),
        "searches in": lambda samples: "rewards" in samples,
        "compares": lambda samples: samples > 0,
        "computes with": lambda samples: 2 * samples,
        "takes as a number": lambda samples: float(samples),
        "reads ['rewards'] of": lambda samples: samples["rewards"],
        "sets ['rewards'] of": lambda samples: samples.__setitem__("rewards", 0),
        "reads .rewards of": lambda samples: samples.rewards,
        "sets .rewards of": lambda samples: setattr(samples, "rewards", 0),
    }


@pytest.mark.parametrize("use", uses_of_a_handle())
def test_data_cannot_be_looked_at_while_a_flow_is_recorded(use):
    def env_flow(prompts):
        return uses_of_a_handle()[use](policy.forward_step(prompts))

    with pytest.raises(FlowError) as refusal:
        record(env_flow)
    message = str(refusal.value)
    assert message.startswith(f"env_flow: {use}")
    assert "the result of policy.forward_step>, which is known only when the job runs" in message


def refused(function, *parts):
    with pytest.raises(FlowError) as refusal:
        record(function).require_result()
    for part in parts:
        assert part in str(refusal.value)


def test_a_function_that_raises_is_named_with_its_error():
    def env_flow(prompts):
        return {}[policy.forward_step(prompts).recording.name]

    refused(env_flow, "env_flow raised KeyError", "which models it calls: 'env_flow'")


def test_arguments_other_than_handles_are_refused():
    def env_flow(prompts):
        return policy.forward_step(prompts, 3)

    refused(env_flow, "argument 2 of policy.forward_step is 3", "passes handles only")


def test_a_handle_is_of_use_in_its_own_flow_only():
    kept = []
    record(lambda prompts: kept.append(policy.forward_step(prompts)))

    def env_flow(prompts):
        return reward.forward_step(policy.forward_step(prompts), kept[0])

    refused(env_flow, "argument 2 of reward.forward_step is <<lambda>: the result of policy.")
    refused(lambda prompts: kept[0], "<lambda> returns <<lambda>: ", "of its own calls")
    with pytest.raises(FlowError, match="only in the flow that it was made in"):
        policy.forward_step(kept[0])


def test_a_flow_has_to_return_handles_and_to_use_all_results():
    refused(lambda prompts: None, "<lambda> returns nothing")
    refused(lambda prompts: {"samples": prompts}, "returns {'samples': <<lambda>: its argument>}")

    def forgetful(prompts):
        samples = policy.forward_step(prompts)
        reward.forward_step(reference.forward_step(samples))
        return samples

    refused(forgetful, "forgetful: the result of reward.forward_step is not used")


def test_a_flow_takes_one_argument():
    refused(lambda: None, "<lambda> must take one argument")
    refused(lambda prompts, more: None, "must take one argument, the handle of the data: missing")


def test_modules_of_a_flow_are_of_one_job_and_one_of_each_name():
    other_job = SimpleNamespace(path="other.yaml", models={"reward": None})
    stranger = Scorer("reward", other_job)
    twin = Scorer("policy", JOB)

    refused(
        lambda prompts: stranger.forward_step(policy.forward_step(prompts)),
        "models.reward is of the job other.yaml, models.policy of another one, job.yaml",
    )
    refused(
        lambda prompts: twin.forward_step(policy.forward_step(prompts)),
        "calls two modules that are models.policy",
    )


def test_only_the_methods_of_its_role_may_be_called():
    flow = record(lambda prompts: reward.eval_forward(policy.forward_step(prompts)))

    flow.require_methods("forward_step", "eval_forward")
    with pytest.raises(FlowError, match="calls reward.eval_forward; in this place .* forward_step"):
        flow.require_methods("forward_step")


def test_apply_is_for_handles():
    with pytest.raises(FlowError, match=r"apply\(advantages, \.\.\.\): takes a function and then"):
        apply(advantages, {"rewards": 1.0})
    with pytest.raises(FlowError, match="takes a function and then the handles"):
        apply(advantages)


def test_a_handle_can_be_shown():
    flow = record(lambda prompts: policy.forward_step(prompts))
    assert isinstance(flow.returned[0], Handle)
    assert f"{flow.returned[0]}" == "<<lambda>: the result of policy.forward_step>"
