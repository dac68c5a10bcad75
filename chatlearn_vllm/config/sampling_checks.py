"""Would vLLM take the values of its SamplingParams, and as they are?

vLLM looks at them when the first prompt comes, with everything built.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from chatlearn_vllm.config.server_checks import START
from chatlearn_vllm.config.upstream_fields import sampling_map_fields

if TYPE_CHECKING:
    from chatlearn_vllm.config.model_args import ModelArgs
    from chatlearn_vllm.config.problems import Key
    from chatlearn_vllm.config.schema import ModelConfig

MAX_LOGPROBS = 20
"""vLLM's own bound on logprobs, where max_logprobs names no other."""

LEAST_TEMPERATURE = 0.01
"""Of those above 0."""
MOST_TEMPERATURE = 2.0
MOST_PENALTY = 2.0

_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""Of structured_outputs, one of which is given."""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


def _are_biases(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_count(token) and isinstance(bias, int | float) and not isinstance(bias, bool)
        for token, bias in value.items()
    )


_TOKENS = "must be a list of token ids"
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stop_token_ids": (lambda value: value == [] or _are_tokens(value), _TOKENS),
    "allowed_token_ids": (_are_tokens, _TOKENS),
    "logprob_token_ids": (_are_tokens, _TOKENS),
    "bad_words": (_are_texts, "must be a list of texts"),
    "logit_bias": (_are_biases, "must be a map from token ids to numbers"),
    "extra_args": (lambda value: isinstance(value, dict), "must be a map of keys"),
    "min_tokens": (_is_count, "must be a number of tokens, 0 or more"),
}
"""Fields that hold more than one value: how these must look."""


def sampling_problems(model: ModelConfig) -> Iterator[tuple[Key, str]]:
    """Values that vLLM would refuse, with the rule."""
    args, at = model.model_args, ("models", model.name, "model_args")
    given = {name: value for name, value in args.sampling_args.items() if value is not None}
    for name, (holds, rule) in _FORMS.items():
        if name in given and not holds(given[name]):
            yield (*at, name), rule
    for name in ("structured_outputs", "repetition_detection"):
        if name in given and (rule := _map_problem(name, given[name])):
            yield (*at, name), rule
    yield from _number_problems(args, at)
    yield from _logprobs_problems(args, given, at)
    thinks = args.engine_args.keys() & {"reasoning_parser", "reasoning_config"}
    if "thinking_token_budget" in given and args.inference_engine == "vllm" and not thinks:
        yield (
            (*at, "thinking_token_budget"),
            "needs reasoning_parser or reasoning_config, which say how vLLM knows thoughts",
        )
    longest = args.max_new_tokens if args.new_token_limit else args.seq_length - 1
    if given.get("min_tokens", 0) > longest:
        limit = f"max_new_tokens={longest}" if args.new_token_limit else f"{longest}"
        yield (*at, "min_tokens"), f"must be at most {limit}, the longest response"


def _map_problem(name: str, value: Any) -> str | None:
    """What is wrong with a field that is a map of further ones."""
    if not isinstance(value, dict):
        return "must be a map of keys"
    known = sampling_map_fields(name)
    for key in value:
        if known and key not in known:
            nearest = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            return f"vLLM knows no {key} in it{hint}"
    if (
        name == "structured_outputs"
        and sum(value.get(one) is not None for one in _CONSTRAINTS) != 1
    ):
        return f"must hold one of {', '.join(_CONSTRAINTS)}"
    if name == "structured_outputs":
        return _constraint_problem(value)
    if name == "repetition_detection":
        if not all(map(_is_count, value.values())):
            return "must hold whole numbers"
        if value.get("max_pattern_size", 0) and value.get("min_count", 0) < 2:
            return "needs min_count, of at least 2"
    return None


def _constraint_problem(given: dict[str, Any]) -> str | None:
    """What is wrong with what responses are to be like."""
    choice, schema = given.get("choice"), given.get("json")
    for name in ("regex", "grammar", "structural_tag"):
        if given.get(name) is not None and not isinstance(given[name], str):
            return f"{name} in it must be text"
    if choice is not None and not (choice and _are_texts(choice)):
        return "choice in it must be a list of texts"
    if given.get("json_object") is False:
        return "json_object in it must be True; leave it out for other responses"
    if isinstance(schema, str):
        try:
            json.loads(schema)
        except ValueError as error:
            return f"json in it is no JSON: {error}"
    elif schema is not None and not isinstance(schema, dict):
        return "json in it must be a JSON schema, as a map or text"
    return None


def _number_problems(args: ModelArgs, at: Key) -> Iterator[tuple[Key, str]]:
    """Numbers with a key of ours that vLLM takes in a smaller range, or changes."""
    is_vllms = args.inference_engine != "transformers"
    for prefix in ("", "eval_"):
        name = f"{prefix}temperature"
        if 0 < args[name] < LEAST_TEMPERATURE:
            yield (
                (*at, name),
                f"must be 0, or at least {LEAST_TEMPERATURE}, to which vLLM would raise it; its "
                "log-probabilities would be those of another temperature than the trainer's",
            )
        if is_vllms and args[name] > MOST_TEMPERATURE:
            yield (*at, name), f"must be at most {MOST_TEMPERATURE:g}, vLLM takes no higher one"
        for penalty in ("presence_penalty", "frequency_penalty"):
            if is_vllms and abs(args[prefix + penalty]) > MOST_PENALTY:
                rule = f"must be from -{MOST_PENALTY:g} to {MOST_PENALTY:g}, vLLM takes no other"
                yield (*at, prefix + penalty), rule


def _logprobs_problems(
    args: ModelArgs, given: dict[str, Any], at: Key
) -> Iterator[tuple[Key, str]]:
    most = args.engine_args.get("max_logprobs") or MAX_LOGPROBS
    # Transformers has no bound, a server elsewhere has its own.
    is_bound = args.inference_engine == "vllm" or args.vllm_server == (START,)
    for name, number in (
        ("logprobs", given.get("logprobs")),
        ("prompt_logprobs", args.prompt_logprobs),
    ):
        if number is None or most == -1 or (0 <= number and (number <= most or not is_bound)):
            continue
        rule = "must be at least 0"
        if is_bound:
            rule = f"must be from 0 to max_logprobs={most}; lower it, or raise max_logprobs"
        yield (*at, name), rule
    if "logprobs" in args.sampling_args and "logprobs" not in given:
        yield (*at, "logprobs"), "must be 0 or more: batches hold them; leave it out"
    tokens = given.get("logprob_token_ids")
    if _are_tokens(tokens) and given.get("logprobs") != len(tokens):
        yield (*at, "logprob_token_ids"), f"needs logprobs: {len(tokens)}, as many as it names"
