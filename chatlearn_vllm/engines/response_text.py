"""What text is a response, seen as the continuation of its prompt?

vLLM makes text token by token, and with log-probabilities of every sampled token, too: some 40 us a
token of the one thread that also schedules, more than the GPU needs for it in a small model. Here a
finished prompt's responses are decoded in one go.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

Decode = Callable[[list[list[int]]], list[str]]
"""Makes texts of lists of token ids."""

_CONTEXT = 8
"""Tokens of the prompt that are decoded with a response: the first characters of a response may
depend on what comes before (a space at the beginning of a text is dropped)."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MOST_UNFINISHED = 8
"""Tokens at the end of a response that may be left out because they make no whole character: three
bytes of one, and a few of others that were broken off."""


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


def decoder_of(tokenizer: Any, *, skip_special_tokens: bool) -> Decode:
    """What makes texts of lists of token ids as `tokenizer.decode` does, where possible faster.

    transformers looks at every token in Python before it calls the `tokenizers` library, which
    takes three times as long as that does; where it would add nothing, that library is called at
    once.
    """
    from transformers import PreTrainedTokenizerFast

    # vLLM's own classes in front of a tokenizer's lend it to one thread at a time, and cache.
    kind = next(k for k in type(tokenizer).__mro__ if not k.__module__.startswith("vllm."))
    is_plain = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerFast.decode
        and kind._decode is PreTrainedTokenizerFast._decode
        and not tokenizer.clean_up_tokenization_spaces
    )
    if is_plain:
        decode_batch = tokenizer.backend_tokenizer.decode_batch
        return partial(decode_batch, skip_special_tokens=skip_special_tokens)
    return lambda lists: [
        tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in lists
    ]


def response_texts(
    decode: Decode, prompt_token_ids: Sequence[int], responses: Sequence[list[int]]
) -> list[str]:
    """The text that each response of a prompt adds to the prompt's.

    Where the last bytes of a character are missing, the text is that of the tokens before it, as in
    vLLM.

    Args:
        decode: makes texts of lists of token ids.
        prompt_token_ids: of the prompt.
        responses: their token ids, without the token that ended them.
    """
    context = list(prompt_token_ids[-_CONTEXT:])
    before, *wholes = decode([context, *([*context, *ids] for ids in responses)])
    texts = []
    for ids, whole in zip(responses, wholes, strict=True):
        if whole.endswith(_UNFINISHED):
            ids, whole = _finished(decode, context, ids, whole)
        if before.endswith(_UNFINISHED) or not whole.startswith(before):
            (text,) = decode([ids])
        else:
            text = whole[len(before) :]
        texts.append(text.rstrip(_UNFINISHED) if ids else "")
    return texts


def _finished(
    decode: Decode, context: list[int], ids: list[int], whole: str
) -> tuple[list[int], str]:
    """The tokens of a response up to its last whole character, and their text with the context.

    Cutting the text would not do: a tokenizer that falls back to bytes makes replacement characters
    of the finished ones before an unfinished one, too.
    """
    for number in range(1, min(len(ids), _MOST_UNFINISHED) + 1):
        (shorter,) = decode([[*context, *ids[:-number]]])
        if not shorter.endswith(_UNFINISHED):
            return ids[:-number], shorter
    return ids, whole
