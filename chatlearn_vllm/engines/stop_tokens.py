"""Which stop strings are special tokens, that are left out of the text in which they are sought?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_stop_tokens(sampling: Mapping[str, Any], tokenizer: Any, model: str) -> dict[str, Any]:
    """Sampling arguments in which stop strings that are special tokens end a response as tokens.

    All engines look for stop strings in the text of a response, which has no special tokens unless
    `skip_special_tokens` is False.

    Args:
        sampling: with `stop` and `skip_special_tokens`, but for a beam search.
        tokenizer: of Hugging Face.
        model: whose they are, for errors.

    Raises:
        ValueError: a stop string has a special token among other text, and would never be found.
    """
    if not sampling.get("stop") or not sampling["skip_special_tokens"]:
        return dict(sampling)
    tokens = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token.content: token_id for token_id, token in tokens.items() if token.special}
    for string in (one for one in sampling["stop"] if one not in special):
        inside = next((one for one in special if one in string), None)
        if inside is not None:
            raise ValueError(
                f"{model}: stop_token_list: {string!r} would never end a response, because "
                f"{inside!r} in it is a special token, which is left out of the text: write "
                f"{inside!r} alone, or set skip_special_tokens: False"
            )
    found = [special[string] for string in sampling["stop"] if string in special]
    return {
        **sampling,
        "stop": [string for string in sampling["stop"] if string not in special],
        "stop_token_ids": [*(sampling.get("stop_token_ids") or ()), *found],
    }
