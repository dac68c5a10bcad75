"""Does each call of a flow get the right columns? And which flows have no policy?"""

from types import SimpleNamespace

import pytest
import torch

from chatlearn_vllm.data.batch import select
from chatlearn_vllm.job.flow import FlowError, apply, record
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.runtime.flow_steps import call_function, merged, policy_call, run_flow

NAMES = ("policy", "reward", "style", "reference", "other_policy")
JOB = SimpleNamespace(path="job.yaml", models=dict.fromkeys(NAMES))


class Policy(BaseModule):
    def build_prompts(self, prompts, is_eval=False):
        raise AssertionError("only ranks are asked")

    generate = build_prompts


policy, other_policy = Policy("policy", JOB), Policy("other_policy", JOB)
reward, style, reference = (BaseModule(name, JOB) for name in ("reward", "style", "reference"))

ANSWERS = {
    "policy": lambda batch: {"tokens": torch.tensor([[1, 2], [3, 4], [5, 6]]), "text": ["a"] * 3},
    "reward": lambda batch: {"rewards": batch["tokens"].sum(1).float()},
    "style": lambda batch: {"rewards": torch.ones(3)},
    "reference": lambda batch: {"ref_logprobs": -batch["tokens"].float(), "text": ["a"] * 3},
}


def run(function):
    """Results by the name of the call, and what the flow returns."""
    flow = record(function)
    seen = {}

    def run_call(call, inputs):
        seen[str(call)] = sorted(inputs)
        if call.module is None:
            return call_function(flow, call, inputs)[0]
        return ANSWERS[call.module.name](inputs)

    results = run_flow(flow, run_call)
    returned = merged(flow, "the returned handles", flow.returned, results)
    return returned, seen


def test_a_result_has_the_columns_of_its_inputs_and_those_that_were_added():
    def env_flow(prompts):
        samples = policy.forward_step(prompts)
        return reward.forward_step(samples), reference.forward_step(samples)

    batch, seen = run(env_flow)

    assert seen == {
        "policy.forward_step": [],
        "reward.forward_step": ["text", "tokens"],
        "reference.forward_step": ["text", "tokens"],
    }
    assert sorted(batch) == ["ref_logprobs", "rewards", "text", "tokens"]
    assert batch["rewards"].tolist() == [3.0, 7.0, 11.0]


def test_a_column_that_was_made_of_another_one_replaces_it():
    def env_flow(prompts):
        scored = reward.forward_step(policy.forward_step(prompts))
        halved = apply(lambda batch: {"rewards": batch["rewards"] / 2}, scored)
        return halved, scored

    batch, _ = run(env_flow)
    assert batch["rewards"].tolist() == [1.5, 3.5, 5.5]
    again, _ = run(lambda prompts: env_flow(prompts)[::-1])
    assert again["rewards"].tolist() == [1.5, 3.5, 5.5]


def test_a_function_may_choose_rows():
    def best(batch):
        return select(batch, batch["rewards"].argsort(descending=True)[:2])

    batch, _ = run(lambda prompts: apply(best, reward.forward_step(policy.forward_step(prompts))))
    assert batch["tokens"].tolist() == [[5, 6], [3, 4]]
    assert batch["text"] == ["a", "a"]


def test_a_function_cannot_change_the_batch_that_others_get():
    def env_flow(prompts):
        samples = policy.forward_step(prompts)
        emptied = apply(lambda batch: batch.clear() or {"rewards": torch.zeros(3)}, samples)
        return emptied, samples

    batch, _ = run(env_flow)
    assert sorted(batch) == ["rewards", "text", "tokens"]


def refused(function, message):
    with pytest.raises(FlowError, match=message):
        run(function)


def test_columns_that_disagree_are_an_error():
    def env_flow(prompts):
        samples = policy.forward_step(prompts)
        return reward.forward_step(samples), style.forward_step(samples)

    refused(
        env_flow,
        "env_flow: the returned handles disagree: reward.forward_step and style.forward_step have "
        "different 'rewards'",
    )


def tensors(*lengths):
    return [torch.arange(length) for length in lengths]


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        (["a", "b", "c"], ["a", "b", "c"], True),
        (["a", "b", "c"], ["a", "b", "d"], False),
        ([1, 2, 3], [1.0, 2.0, 3.0], False),
        (tensors(1, 2, 3), tensors(1, 2, 3), True),
        (tensors(1, 2, 3), tensors(1, 2, 4), False),
        (tensors(1, 2, 3), ["a", "b", "c"], False),
        (["a", "b", "c"], tensors(1, 2, 3), False),
        (torch.ones(3), torch.ones(3), True),
        (torch.ones(3), [1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0], torch.ones(3), False),
    ],
)
def test_columns_agree_if_all_their_entries_do(one, other, is_equal):
    def env_flow(prompts):
        samples = policy.forward_step(prompts)
        return [apply(lambda batch, column=column: {"mine": column}, samples)
                for column in (one, other)]  # fmt: skip

    if is_equal:
        assert len(run(env_flow)[0]["mine"]) == 3
    else:
        refused(env_flow, "the returned handles disagree: .* have different 'mine'")


def test_batches_of_different_lengths_cannot_be_merged():
    def env_flow(prompts):
        samples = policy.forward_step(prompts)
        return reward.forward_step(apply(lambda batch: select(batch, [0]), samples), samples)

    refused(env_flow, "the inputs of reward.forward_step have different numbers of rows: 3 of pol")


def test_columns_of_another_length_are_an_error():
    def short(batch):
        return {"rewards": torch.zeros(2)}

    refused(
        lambda prompts: apply(short, policy.forward_step(prompts)),
        r"what short returned \(\['rewards'\]\): all values of a batch must have the same length",
    )


def test_a_function_returns_columns_and_perhaps_metrics():
    def with_metrics(batch):
        return {"rewards": torch.zeros(3)}, {"rollout/zeros": 3.0}

    flow = record(lambda prompts: apply(with_metrics, policy.forward_step(prompts)))
    assert call_function(flow, flow.calls[1], {})[1] == {"rollout/zeros": 3.0}

    refused(
        lambda prompts: apply(lambda batch: torch.zeros(3), policy.forward_step(prompts)),
        "<lambda> returned Tensor; a function given to apply returns a dict of columns",
    )


def test_the_policy_is_found_among_models_that_score():
    flow = record(lambda prompts: reward.forward_step(policy.forward_step(prompts)))
    assert policy_call(flow, "forward_step") is flow.calls[0]


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (lambda prompts: None, "<lambda> calls no policy"),
        (lambda prompts: reward.forward_step(prompts), "to reward.forward_step, which answers no"),
        (lambda prompts: apply(len, prompts), "to len, which answers none"),
        (
            lambda prompts: [policy.forward_step(prompts), policy.forward_step(prompts)],
            "the prompts, to policy.forward_step, policy.forward_step; only the policy gets it, on",
        ),
        (
            lambda prompts: reward.forward_step(policy.forward_step(prompts), prompts),
            "to policy.forward_step, reward.forward_step; only the policy gets it, once",
        ),
        (
            lambda prompts: policy.forward_step(policy.forward_step(prompts)),
            "policy.forward_step is called on samples",
        ),
        (
            lambda prompts: other_policy.forward_step(policy.forward_step(prompts)),
            "other_policy.forward_step is called on samples",
        ),
        (lambda prompts: policy.forward_step(prompts, prompts), "takes the prompts and nothing"),
    ],
)  # fmt: skip
def test_a_flow_has_one_policy_and_it_answers_the_prompts(flow, message):
    with pytest.raises(FlowError, match=message):
        policy_call(record(flow), "forward_step")
