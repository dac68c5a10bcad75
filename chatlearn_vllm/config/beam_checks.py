"""What goes together with a beam search?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlearn_vllm.config.model_args import ModelArgs
    from chatlearn_vllm.config.problems import Key
    from chatlearn_vllm.config.schema import ModelConfig, RuntimeConfig

SAMPLING_KEYS = ("stop_token_ids",)
"""Those fields of vLLM's SamplingParams without a key of their own that a beam search reads."""

_MOST_BITS = 1000
"""Of length ** length_penalty, less than what a floating point number has in its exponent."""
_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


def beam_problems(model: ModelConfig, runtime: RuntimeConfig) -> Iterator[tuple[Key, str]]:
    """Keys that contradict a beam search of the same file, with the remedy."""
    args, at = model.model_args, ("models", model.name, "model_args")
    width, number = args.beam_width(is_eval=False), args.responses_per_prompt
    beams = {is_eval: args.beam_width(is_eval=is_eval) > 1 for is_eval in (False, True)}
    if args.use_beam_search and width == 1:
        yield (*at, "use_beam_search"), "needs a width; set num_beams, or n, to more than 1"
    if beams[False] and number > width:
        yield (
            (*at, "num_beams"),
            f"must be at least num_inference_per_prompt x n = {number}, which are returned",
        )
    if beams[False] and runtime.max_rollout_round > 1:
        yield (
            ("runtime", "max_rollout_round"),
            f"must be 1 with num_beams={width} of models.{model.name}: a search is not cut off",
        )
    if not any(beams.values()):
        return
    asked = key_of_beams(args)
    most = math.floor(_MOST_BITS / math.log2(max(args.seq_length, 2)))
    if abs(args.length_penalty) > most:
        yield (
            (*at, "length_penalty"),
            f"must be from -{most} to {most}: scores of beams, log-probability / length ** "
            f"length_penalty, have to be numbers up to seq_length={args.seq_length}",
        )
    for prefix, is_eval in (("", False), ("eval_", True)):
        for name, neutral in _PENALTIES.items():
            if beams[is_eval] and args[prefix + name] != neutral:
                yield (
                    (*at, prefix + name),
                    f"must be {neutral:g} with {asked}: beams are compared by their probability",
                )
    if args.stop_token_list:
        yield (
            (*at, "stop_token_list"),
            f"does not go with {asked}: a beam ends with a token; leave it out, or say "
            "stop_token_ids",
        )
    if args.prompt_logprobs is not None:
        yield (*at, "prompt_logprobs"), f"must be None with {asked}"
    for name in args.sampling_args:
        # How stop strings end is told with these.
        is_of_stops = name == "include_stop_str_in_output" and args.stop_token_list
        if name not in SAMPLING_KEYS and not is_of_stops:
            yield (*at, name), f"does not go with {asked}; leave it out"


def key_of_beams(args: ModelArgs) -> str:
    """The key that asks for beams, in a model that is asked for them."""
    if args.num_beams > 1:
        return "num_beams"
    return "use_beam_search" if args.use_beam_search else "eval_num_beams"
