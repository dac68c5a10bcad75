"""Are values of vLLM's sampling keys refused before anything starts, if vLLM would, later?"""

import pytest

from chatlearn_vllm.config import ConfigError, load_config
from chatlearn_vllm.config.upstream_fields import sampling_map_fields, upstream_fields

AT = "models.policy.model_args"


def overrides(*keys: str) -> list[str]:
    return [f"{AT}.{key}" for key in keys]


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        (["stop_token_ids=5"], "stop_token_ids=5: must be a list of token ids"),
        (["allowed_token_ids=[]"], "allowed_token_ids=[]: must be a list of token ids"),
        (["allowed_token_ids=[1, x]"], "must be a list of token ids"),
        (["bad_words=no"], "bad_words=False: must be a list of texts"),
        (["extra_args=5"], "extra_args=5: must be a map of keys"),
        (["min_tokens=-1"], "min_tokens=-1: must be a number of tokens, 0 or more"),
        (["structured_outputs={regex: 5}"], "regex in it must be text"),
        (["structured_outputs={choice: []}"], "choice in it must be a list of texts"),
        (["structured_outputs={json: '{bad'}"], "json in it is no JSON"),
        (["structured_outputs={json: 3}"], "json in it must be a JSON schema, as a map or text"),
        (["structured_outputs={json_object: False}"], "json_object in it must be True"),
        (["logit_bias={x: 1.0}"], "logit_bias={'x': 1.0}: must be a map from token ids to num"),
        (["logit_bias={3: high}"], "must be a map from token ids to numbers"),
        (["structured_outputs={regexx: a}"], "vLLM knows no regexx in it; did you mean regex?"),
        (["structured_outputs={regex: a, choice: [a]}"], "must hold one of json, regex, choice"),
        (["structured_outputs=regex"], "structured_outputs='regex': must be a map of keys"),
        (["repetition_detection={max_pattern_size: 3}"], "needs min_count, of at least 2"),
        (["repetition_detection={min_count: x}"], "must hold whole numbers"),
        (["logprobs=-1"], "logprobs=-1: must be from 0 to max_logprobs=20"),
        (["logprobs=30", "max_logprobs=25"], "logprobs=30: must be from 0 to max_logprobs=25"),
        (["logprobs=-2", "inference_engine=transformers"], "logprobs=-2: must be at least 0"),
        (["logprobs=None"], "logprobs=None: must be 0 or more: batches hold them; leave it out"),
        (["thinking_token_budget=9"], "budget=9: needs reasoning_parser or reasoning_config"),
        (["prompt_logprobs=21"], "prompt_logprobs=21: must be from 0 to max_logprobs=20"),
        (["logprob_token_ids=[4, 5]"], "logprob_token_ids=[4, 5]: needs logprobs: 2"),
        (["min_tokens=33"], "min_tokens=33: must be at most max_new_tokens=32"),
        (["min_tokens=64", "new_token_limit=False"], "must be at most 63, the longest response"),
        (["temperature=0.001"], "temperature=0.001: must be 0, or at least 0.01, to which vLLM"),
        (["eval_temperature=2.5"], "eval_temperature=2.5: must be at most 2, vLLM takes no higher"),
        (["frequency_penalty=-3"], "frequency_penalty=-3: must be from -2 to 2"),
        (["output_kind=DELTA"], "output_kind='DELTA': is set by the runtime; leave it out"),
    ],
)
def test_what_vllm_would_refuse_is_refused_with_its_rule(job, keys, rule) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(job, overrides(*keys))
    (problem,) = caught.value.problems
    assert rule in str(problem) and str(problem).startswith(f"command line: {AT}.")


def test_token_ids_in_a_file_are_numbers(job, write) -> None:
    write("policy.yaml", "seq_length: 64\nmax_new_tokens: 32\nlogit_bias: {5: 1.0, 7: -2}\n")
    args = load_config(job).models["policy"].model_args
    assert args.sampling_args["logit_bias"] == {5: 1.0, 7: -2}


def test_what_vllm_takes_is_passed_on(job) -> None:
    given = {
        "stop_token_ids": [],
        "allowed_token_ids": [1, 2],
        "bad_words": ["no"],
        "logit_bias": {3: -1},
        "structured_outputs": {"regex": "[0-9]+", "disable_any_whitespace": True},
        "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
        "logprobs": 30,
        "min_tokens": 63,
        "thinking_token_budget": 9,
    }
    load_config(job, overrides("temperature=5", "inference_engine=transformers"))
    keys = [f"{name}={value}" for name, value in given.items()]
    keys += ["max_logprobs=-1", "new_token_limit=False", "reasoning_parser=qwen3"]
    assert load_config(job, overrides(*keys)).models["policy"].model_args.sampling_args == given


def test_keys_that_change_what_is_drawn_are_named(job) -> None:
    keys = ["thinking_token_budget=4"]
    if "watermarking" in upstream_fields()["sampling_args"]:  # vLLM 0.25 has no such field
        keys.append("watermarking=True")
    [notice] = load_config(job, overrides(*keys, "reasoning_parser=qwen3")).notices
    assert f"{', '.join(keys)} draws training responses from a" in notice


def test_fields_of_maps_are_those_of_vllms_classes() -> None:
    from dataclasses import fields

    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    for name, cls in (
        ("structured_outputs", StructuredOutputsParams),
        ("repetition_detection", RepetitionDetectionParams),
    ):
        public = {one.name for one in fields(cls) if not one.name.startswith("_")}
        assert sampling_map_fields(name) == public
