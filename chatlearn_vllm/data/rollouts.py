"""How do vLLM's finished requests become a batch?"""

from collections.abc import Sequence
from typing import Any

import torch


def rollouts_to_batch(outputs: Sequence[Any], seq_length: int, pad_token_id: int) -> dict[str, Any]:
    """Turn finished requests into the batch contract of `data/batch.py`.

    Only sampled tokens count as actions: an end-of-sequence token is in the loss mask if and only
    if it was sampled, and a response cut at its token limit ends without one.

    Args:
        outputs: P `vllm.RequestOutput`s with n completions each.
        seq_length: S, the width of the batch.
        pad_token_id: fills up to S; by convention the tokenizer's eos_token_id.

    Returns:
        A batch of B = P * n rows in request order, responses of a prompt adjacent.

    Raises:
        ValueError: a prompt with its response is longer than `seq_length`, or a completion lacks
            log-probabilities.
    """
    rows = [(output, completion) for output in outputs for completion in output.outputs]
    all_tokens = torch.full((len(rows), seq_length), pad_token_id, dtype=torch.int64)
    logprobs = torch.zeros(len(rows), max(seq_length - 1, 0), dtype=torch.float32)
    loss_mask = torch.zeros(len(rows), seq_length, dtype=torch.float32)
    for row, (output, completion) in enumerate(rows):
        prompt, response = list(output.prompt_token_ids), list(completion.token_ids)
        start, stop = len(prompt), len(prompt) + len(response)
        if stop > seq_length:
            raise ValueError(
                f"request {output.request_id}: {start} prompt + {len(response)} response tokens "
                f"do not fit in seq_length={seq_length}"
            )
        if completion.logprobs is None:
            raise ValueError(f"request {output.request_id}: no logprobs; set logprobs >= 0")
        all_tokens[row, :stop] = torch.tensor(prompt + response)
        loss_mask[row, start:stop] = 1.0
        logprobs[row, start - 1 : stop - 1] = _sampled(completion.logprobs, response)
        if output.prompt_logprobs is not None:
            logprobs[row, : start - 1] = _sampled(output.prompt_logprobs[1:], prompt[1:])
    return {
        "all_tokens": all_tokens,
        "logprobs": logprobs,
        "loss_mask": loss_mask,
        "no_padded_query_ids": [torch.tensor(output.prompt_token_ids) for output, _ in rows],
        "str_prompts": [output.prompt for output, _ in rows],
        "str_outputs": [completion.text for _, completion in rows],
    }


def _sampled(entries: Sequence[dict[int, Any]], tokens: list[int]) -> torch.Tensor:
    """[len(tokens)] log-probability of each token from vLLM's per-position dicts."""
    flat = getattr(entries, "logprobs", None)  # vLLM's flat_logprobs: all positions in one list
    if flat is not None and len(flat) == len(tokens):
        return torch.tensor(flat)
    return torch.tensor([e[token].logprob for e, token in zip(entries, tokens, strict=True)])
