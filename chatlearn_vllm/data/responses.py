"""How do given prompts and responses become rows that a model learns from?"""

from collections.abc import Sequence
from typing import Any

import torch

from chatlearn_vllm.data.batch import Batch


def require_eos(tokenizer: Any, directory: str) -> None:
    """Check that a tokenizer has the token that ends a complete response.

    Args:
        tokenizer: of transformers.
        directory: that it was read from, for the message.

    Raises:
        ValueError: it has none: a model would learn no end.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {directory} has no eos_token, with which a response that is learned "
            "ends; name one of its tokens as eos_token in its tokenizer_config.json"
        )


def response_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    seq_length: int,
    pad_id: int,
) -> Batch:
    """Put each response behind its prompt.

    Args:
        prompts: B lists of token ids.
        responses: B lists of token ids, an EOS included where the response is complete.
        seq_length: S, at least the length of a prompt and its response.
        pad_id: token behind a response.

    Returns:
        `all_tokens` int64 [B, S] and `loss_mask` float32 [B, S], which is 1.0 on the responses.
    """
    all_tokens = torch.full((len(prompts), seq_length), pad_id)
    loss_mask = torch.zeros(len(prompts), seq_length)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, stop = len(prompt), len(prompt) + len(response)
        all_tokens[row, :stop] = torch.tensor([*prompt, *response])
        loss_mask[row, start:stop] = 1.0
    return {"all_tokens": all_tokens, "loss_mask": loss_mask}
