"""How do vLLM's finished requests become a batch?"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch


def rollouts_to_batch(
    outputs: Sequence[Any], seq_length: int, pad_token_id: int | None
) -> dict[str, Any]:
    """Turn finished requests into the batch contract of `data/batch.py`.

    Only sampled tokens count as actions: an end-of-sequence token is in the loss mask if and only
    if it was sampled, and a response cut at its token limit ends without one.

    Args:
        outputs: P `vllm.RequestOutput`s with n completions each.
        seq_length: S, the width of the batch.
        pad_token_id: fills up to S; by convention the tokenizer's eos_token_id; None, where it
            has none: 0. No mask includes it.

    Returns:
        A batch of B = P * n rows in request order, responses of a prompt adjacent; these share one
        tensor of the prompt's tokens.

    Raises:
        ValueError: a prompt with its response is longer than `seq_length`, or a completion lacks
            log-probabilities.
    """
    rows = [(output, completion) for output in outputs for completion in output.outputs]
    starts = np.array([len(output.prompt_token_ids) for output, _ in rows], dtype=np.int64)
    lengths = np.array([len(completion.token_ids) for _, completion in rows], dtype=np.int64)
    _check(rows, starts + lengths, seq_length)

    # Rows are filled all at once: a conversion for each would take longer than several steps.
    places = np.arange(seq_length)
    sampled = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
    tokens = np.full((len(rows), seq_length), pad_token_id or 0, dtype=np.int64)
    tokens[sampled] = _flat((completion.token_ids for _, completion in rows), np.int64)
    logprobs = np.zeros((len(rows), seq_length - 1), dtype=np.float32)
    logprobs[sampled[:, 1:]] = _flat(
        (_sampled(completion.logprobs, completion.token_ids) for _, completion in rows), np.float32
    )
    prompts = []
    for output in outputs:
        first, n = len(prompts), len(output.outputs)
        prompt = torch.tensor(list(output.prompt_token_ids), dtype=torch.int64)
        prompts += [prompt] * n
        tokens[first : first + n, : len(prompt)] = prompt
        if output.prompt_logprobs is not None:
            of_prompt = _sampled(output.prompt_logprobs[1:], output.prompt_token_ids[1:])
            logprobs[first : first + n, : len(prompt) - 1] = of_prompt
    return {
        "all_tokens": torch.from_numpy(tokens),
        "logprobs": torch.from_numpy(logprobs),
        "loss_mask": torch.from_numpy(sampled.astype(np.float32)),
        "no_padded_query_ids": prompts,
        "str_prompts": [output.prompt for output, _ in rows],
        "str_outputs": [completion.text for _, completion in rows],
    }


def _check(rows: Sequence[tuple[Any, Any]], stops: np.ndarray, seq_length: int) -> None:
    for row in np.flatnonzero(stops > seq_length):
        output, completion = rows[row]
        raise ValueError(
            f"request {output.request_id}: {len(output.prompt_token_ids)} prompt + "
            f"{len(completion.token_ids)} response tokens do not fit in seq_length={seq_length}"
        )
    for output, completion in rows:
        if completion.logprobs is None:
            raise ValueError(f"request {output.request_id}: no logprobs; set logprobs >= 0")


def _flat(parts: Iterator[Sequence[Any]], dtype: type) -> np.ndarray:
    """The elements of all parts, one after the other."""
    return np.fromiter(chain.from_iterable(parts), dtype=dtype)


def _sampled(entries: Sequence[dict[int, Any]], tokens: Sequence[int]) -> Sequence[float]:
    """Log-probability of each token, of vLLM's dicts by position."""
    flat = getattr(entries, "logprobs", None)  # vLLM's flat_logprobs: all positions in one list
    if flat is not None and len(flat) == len(tokens):
        return flat
    return [e[token].logprob for e, token in zip(entries, tokens, strict=True)]
