"""When does the guard warn, when does it stop, and what does it say?"""

import pytest

from chatlearn_vllm.modules.mismatch_guard import MismatchError, MismatchGuard

GOOD = {"logprob_abs_diff_mean": 0.01, "rollout_kl": 0.001}
BAD = {"logprob_abs_diff_mean": 0.01, "rollout_kl": 0.5}


def test_a_metric_is_warned_about_once_in_ten_episodes():
    guard = MismatchGuard(warn={"rollout_kl": 0.1, "logprob_abs_diff_mean": 0.05}, stop={})

    assert guard.warnings(GOOD, 1, 1) == []
    (message,) = guard.warnings(BAD, 2, 2)
    assert message.startswith(
        "episode 2, rollouts of weight version 2: "
        "rollout_kl=0.5 is above runtime.mismatch_warn.rollout_kl=0.1; likely causes: "
    )
    assert "top_p" in message and "dtype" in message and "sync" in message
    assert [len(guard.warnings(BAD, episode, episode)) for episode in range(3, 14)] == (
        [0] * 9 + [1, 0]
    )
    # Another metric is silent for reasons of its own only.
    assert len(guard.warnings({**BAD, "logprob_abs_diff_mean": 0.06}, 14, 14)) == 1


def test_a_level_itself_is_allowed():
    guard = MismatchGuard(warn={"rollout_kl": 0.5}, stop={"rollout_kl": 0.5})

    assert guard.warnings(BAD, 1, 1) == []


def test_a_stop_names_every_metric_with_its_value_level_and_key():
    guard = MismatchGuard(warn={}, stop={"logprob_abs_diff_mean": 0.001, "rollout_kl": 0.1})

    with pytest.raises(MismatchError) as caught:
        guard.warnings(BAD, 7, 6)

    message = str(caught.value)
    assert message.startswith(
        "episode 7, rollouts of weight version 6: "
        "logprob_abs_diff_mean=0.01 is above runtime.mismatch_stop.logprob_abs_diff_mean=0.001; "
        "rollout_kl=0.5 is above runtime.mismatch_stop.rollout_kl=0.1."
    )


def test_an_infinite_metric_stops():
    guard = MismatchGuard(warn={}, stop={"rollout_kl": 0.1})

    with pytest.raises(MismatchError, match="rollout_kl=inf"):
        guard.warnings({"rollout_kl": float("inf")}, 1, 1)
