"""Which mismatch levels does a job have, and when can the two sides be compared at all?"""

import pytest

from chatlearn_vllm.config import ConfigError, ModelArgs, load_config
from chatlearn_vllm.config.sampling import incomparable_logprobs


def test_levels_that_are_not_given_keep_their_defaults(job):
    overrides = ["runtime.mismatch_warn.rollout_kl=0.2", "runtime.mismatch_stop.rollout_kl=1"]
    runtime = load_config(job, overrides).runtime

    assert runtime.mismatch_warn.set_levels() == {
        "logprob_abs_diff_mean": 0.05,
        "rollout_kl": 0.2,
        "rollout_clip_fraction": 0.02,
    }
    assert runtime.mismatch_stop.set_levels() == {"rollout_kl": 1.0}


def test_a_level_can_be_switched_off(job):
    runtime = load_config(job, ["runtime.mismatch_warn={rollout_kl: null}"]).runtime

    assert "rollout_kl" not in runtime.mismatch_warn.set_levels()
    assert "logprob_abs_diff_mean" in runtime.mismatch_warn.set_levels()


def test_a_wrong_level_is_refused_with_its_key(job):
    with pytest.raises(ConfigError) as caught:
        load_config(job, ["runtime.mismatch_stop={kl: 1, rollout_kl: -1}"])

    message = str(caught.value)
    assert "runtime.mismatch_stop.kl=1: unknown key" in message
    assert "runtime.mismatch_stop.rollout_kl=-1: must be greater than or equal to 0" in message


def test_samples_of_the_whole_softmax_are_comparable():
    assert incomparable_logprobs(ModelArgs(temperature=0.7), ModelArgs(temperature=0.7)) == []
    # The trainer scores; its own top_p is never read.
    assert incomparable_logprobs(ModelArgs(), ModelArgs(top_p=0.9)) == []


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 20}, "top_k=20"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"sampling_args": {"min_tokens": 4}}, "min_tokens=4"),
        ({"temperature": 0.7}, "temperature=0.7, while the trainer's is 1"),
    ],
)
def test_other_samples_are_not(policy, reason):
    assert incomparable_logprobs(ModelArgs(**policy), ModelArgs()) == [reason]


def test_raw_logprobs_are_of_the_plain_softmax_however_tokens_are_drawn():
    raw = {"logprobs_mode": "raw_logprobs"}
    policy = ModelArgs(top_p=0.9, temperature=0.7, engine_args=raw)

    assert incomparable_logprobs(policy, ModelArgs()) == []
    (reason,) = incomparable_logprobs(policy, ModelArgs(temperature=0.7))
    assert reason == (
        "logprobs_mode='raw_logprobs', which is temperature 1, while the trainer's is 0.7"
    )
