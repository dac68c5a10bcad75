"""Is it told which keys do nothing, as others of the same job are?"""

import pytest

from chatlearn_vllm.config import load_config
from tests.config import strategy_job

TRAINER = "models.policy_trainer.model_args."
NOT_SAVED = "nothing is saved without save_episode_interval"


@pytest.mark.parametrize(
    ("idle", "why", "reads"),
    [
        ("max_ckpt_to_keep=2", NOT_SAVED, "save_episode_interval=1"),
        ("max_data_ckpt_nums=2", NOT_SAVED, "save_episode_interval=1"),
        ("async_save=True", NOT_SAVED, "save_episode_interval=1"),
        (
            "relay_episode_offset=3",
            "no samples are kept without max_relay_episode",
            "max_relay_episode=-1",
        ),
        ("max_num_gen_batches=3", "only with dynamic_sampling: True", "dynamic_sampling=True"),
        ("rollout_over_sampling=0.3", "only with max_rollout_round above 1", "max_rollout_round=2"),
    ],
)
def test_a_key_of_the_job_that_waits_for_another_is_told(job, idle, why, reads):
    idle = f"runtime.{idle}"
    assert load_config(job, [idle]).notices == (f"no effect of {idle}; {why}",)
    assert load_config(job, [idle, f"runtime.{reads}"]).notices == ()


def test_digests_that_are_not_compared_have_no_stride(job):
    idle = "runtime.validate_param_sync_stride=4"
    assert load_config(job, [idle]).notices == ()
    (line,) = load_config(job, [idle, "runtime.validate_param_sync=False"]).notices
    assert line == f"no effect of {idle}; nothing is compared with validate_param_sync: False"


def test_keys_that_wait_for_the_same_are_told_at_once(job):
    idle = ["runtime.max_ckpt_to_keep=2", "runtime.async_save=True"]
    (line,) = load_config(job, idle).notices
    assert line == f"no effect of {idle[1]}, {idle[0]}; {NOT_SAVED}"


def test_a_strategy_file_is_told_in_its_own_words(write):
    path = write("strategy.yaml", strategy_job.JOB)
    (line,) = load_config(path, ["save_steps=0", "max_ckpt_to_keep=2"]).notices
    assert line == "no effect of max_ckpt_to_keep=2; nothing is saved without save_steps"


def test_adapters_are_of_a_model_that_is_trained_and_asks_for_them(job):
    assert load_config(job, [f"{TRAINER}lora_r=4", f"{TRAINER}lora_alpha=8"]).notices == ()
    assert load_config(job, [f"{TRAINER}lora_alpha=8"]).notices == (
        "models.policy_trainer: no effect of lora_alpha=8.0; without lora_r there are no adapters",
    )
    assert load_config(job, ["models.policy.model_args.lora_r=4"]).notices == (
        "models.policy: no effect of lora_r=4; only a model that is trained gets adapters",
    )
    assert load_config(job, ["models.policy_trainer.lora.lora_dim=64"]).notices == (
        "models.policy_trainer.lora: no effect of lora_dim=64; adapters are switched on by lora_r "
        "in the model's file",
    )
