"""Are off-policy samples measured and unfinished ones stored as they are?"""

import json

import torch

from chatlearn_vllm.data.carried import Begun, Carried, carried_metrics, version_lags

BATCH = {
    "weight_version": torch.tensor([5, 6]),
    "token_versions": torch.tensor([[-1, -1, 3, 5], [-1, 5, 4, -1]]),
    "loss_mask": torch.tensor([[0.0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]),
}
"""Sampled tokens of versions 3 and 5 of a rollout that ended with 5, and of 5 and 4 of 6."""

UNFINISHED = Carried(
    prompt_index=7,
    first_sample=12,
    num_rounds=2,
    responses=[
        Begun([5, 6], [-0.5, -1.0], [3, 4]),
        Begun([8], [-0.25], [3], finish_reason="stop", stop_reason="\n"),
    ],
)


def test_a_token_lags_by_the_versions_between_it_and_the_end_of_its_rollout():
    assert version_lags(BATCH).tolist() == [2, 0, 1, 2]


def test_lags_are_averaged_over_sampled_tokens():
    metrics = carried_metrics(BATCH, iter([UNFINISHED] * 3))
    assert json.loads(json.dumps(metrics)) == {  # plain numbers, for the file of metrics
        "rollout/version_lag_mean": 1.25,
        "rollout/version_lag_max": 2.0,
        "rollout/off_policy_fraction": 0.75,
        "rollout/num_carried_prompts": 3,
    }


def test_without_sampled_tokens_nothing_is_off_policy():
    nothing = BATCH | {"loss_mask": torch.zeros(2, 5)}
    assert set(carried_metrics(nothing, []).values()) == {0}


def test_an_unfinished_prompt_survives_a_checkpoint():
    state = json.loads(json.dumps(UNFINISHED.state_dict()))
    assert Carried.from_state_dict(state) == UNFINISHED
