"""Are prompts and responses as long as a strategy file says?"""

from pathlib import Path

import pytest

from chatlearn_vllm.config import load_config
from tests.config.strategy_job import CONFIG, INFER, JOB, args_of, problems_of

FILES = Path(__file__).parent


def test_responses_end_at_a_max_model_len_below_the_sum_of_lengths():
    loaded = load_config(FILES / "batching.yaml")
    policy, trainer = (loaded.models[name].model_args for name in ("policy", "policy_trainer"))
    assert (policy.seq_length, policy.max_new_tokens, policy.new_token_limit) == (8000, 5952, False)
    assert (trainer.seq_length, trainer.max_new_tokens) == (10240, 8192)
    assert any("max_model_len=8000 is less than prompt_length" in one for one in loaded.notices)


@pytest.mark.parametrize(
    ("overrides", "max_new_tokens", "seq_length"),
    [
        ([f"{CONFIG}max_model_len=60"], 20, 60),
        ([f"{CONFIG}max_model_len=60", f"{INFER}max_new_tokens=22"], 20, 60),
        ([f"{CONFIG}max_model_len=60", f"{INFER}max_new_tokens=5"], 5, 45),
        ([f"{CONFIG}max_model_len=64", f"{INFER}max_new_tokens=5"], 5, 45),
        ([f"{INFER}max_new_tokens=8"], 8, 48),
    ],
)
def test_responses_are_no_longer_than_any_key_says_and_prompts_keep_their_length(
    job, overrides, max_new_tokens, seq_length
):
    args = args_of(job, overrides)
    assert (args.max_new_tokens, args.seq_length) == (max_new_tokens, seq_length)
    assert args.seq_length - args.max_new_tokens == 40  # where prompts are cut
    trainer = args_of(job, overrides, "policy_trainer")
    assert (trainer.max_new_tokens, trainer.seq_length) == (24, 64)


def test_a_notice_says_which_sum_max_model_len_is_less_than(job):
    (line,) = load_config(job, [f"{CONFIG}max_model_len=60"]).notices
    assert (
        "max_model_len=60 is less than prompt_length + response_length = 64: responses have at"
        in line
    )
    overrides = [f"{CONFIG}max_model_len=60", f"{INFER}max_new_tokens=22"]
    (line,) = load_config(job, overrides).notices
    assert (
        "max_model_len=60 is less than prompt_length + max_new_tokens = 62: responses have at"
        in line
    )
    assert load_config(job, [f"{CONFIG}max_model_len=60", f"{INFER}max_new_tokens=5"]).notices == ()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["sequence_length=50"], "command line: sequence_length=50: must be prompt_length + "
         "response_length = 40 + 24 = 64; leave it out"),
        (["sequence_length=200"], "command line: sequence_length=200: must be prompt_length + "
         "response_length = 40 + 24 = 64; leave it out"),
        ([f"{INFER}max_new_tokens=40"], f"command line: {INFER}max_new_tokens=40: must be at most "
         "response_length=24, the longest response of the job; raise response_length"),
        (["response_length=None", "sequence_length=64", f"{INFER}max_new_tokens=40"],
         f"command line: {INFER}max_new_tokens=40: must be at most sequence_length - prompt_length "
         "= 24, the longest response of the job; raise that"),
        (["response_length=None", "sequence_length=30", f"{INFER}max_new_tokens=None"],
         "command line: sequence_length=30: must be more than prompt_length=40: a response needs "
         "room behind the prompt"),
        (["prompt_length=None", "sequence_length=24"], "command line: sequence_length=24: must be "
         "more than response_length=24: a prompt needs room, too"),
        ([f"{CONFIG}max_model_len=40"], f"command line: {CONFIG}max_model_len=40: must be more "
         "than prompt_length=40: a response needs room behind it"),
    ],
)  # fmt: skip
def test_lengths_that_disagree_are_told_by_the_keys_that_are_written(job, overrides, line):
    assert problems_of(job, overrides) == [line]


def test_a_sequence_length_below_the_default_of_prompts_names_that_default(write):
    text = JOB.replace("prompt_length: 40\nresponse_length: 24", "sequence_length: 30")
    path = write("job.yaml", text.replace('max_new_tokens: "${response_length}", ', ""))
    assert problems_of(path) == [
        "job.yaml: sequence_length=30: must be more than prompt_length, which is 1024 where the "
        "file does not say it: a response needs room behind the prompt"
    ]


def test_the_length_of_one_kind_follows_from_the_others(job):
    overrides = ["prompt_length=None", "sequence_length=80"]
    args = args_of(job, overrides)
    assert (args.max_new_tokens, args.seq_length) == (24, 80)
    overrides = ["response_length=None", "sequence_length=64", f"{INFER}max_new_tokens=None"]
    assert args_of(job, overrides).max_new_tokens == 24
