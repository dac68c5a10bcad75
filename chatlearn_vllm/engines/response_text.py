"""What text is a response, seen as the continuation of its prompt?

vLLM makes text token by token, and with log-probabilities of every sampled token, too: some 40 us a
token of the one thread that also schedules, more than the GPU needs for it in a small model. Here a
finished response is decoded in one go.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_CONTEXT = 8
"""Tokens of the prompt that are decoded with a response: the first characters of a response may
depend on what comes before (a space at the beginning of a text is dropped)."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TextKeys:
    """The keys of `vllm.SamplingParams` that say what of a response becomes text."""

    skip_special_tokens: bool
    include_stop_str_in_output: bool


def without_text(sampling: dict[str, Any]) -> tuple[dict[str, Any], TextKeys | None]:
    """Sampling keys that have vLLM make no text, and what to make it with later.

    With stop strings vLLM needs the text itself, and it alone can leave out the spaces between
    special tokens: the keys are then returned as they are, and None.
    """
    is_vllms = sampling.get("stop") or not sampling.get("spaces_between_special_tokens", True)
    if is_vllms or not sampling.get("detokenize", True):
        return sampling | {"flat_logprobs": True}, None
    keys = TextKeys(
        sampling.get("skip_special_tokens", True), sampling.get("include_stop_str_in_output", False)
    )
    return sampling | {"flat_logprobs": True, "detokenize": False}, keys


def response_text(
    decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int], token_ids: Sequence[int]
) -> str:
    """The text that a response adds to its prompt's.

    A character of which the last bytes are missing is left out, as vLLM does.

    Args:
        decode: makes text of token ids.
        prompt_token_ids: of the prompt.
        token_ids: of the response, without the token that ended it.
    """
    if not token_ids:
        return ""
    context = list(prompt_token_ids[-_CONTEXT:])
    before = decode(context)
    whole = decode([*context, *token_ids])
    if before.endswith(_UNFINISHED) or not whole.startswith(before):
        text = decode(list(token_ids))
    else:
        text = whole[len(before) :]
    return text.rstrip(_UNFINISHED)
