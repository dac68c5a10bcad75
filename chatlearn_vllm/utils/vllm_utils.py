"""Helpers that policies of ChatLearn import by this path."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def get_model(model_provider: Callable[[], nn.Module | None], model_args: Any) -> nn.Module | None:
    """Build a policy's model.

    Args:
        model_provider: a policy's `model_provider`.
        model_args: the policy's `model_args`; kept for ChatLearn's signature, the provider knows
            them.

    Returns:
        What the provider returned, in inference mode; None where it leaves the model to the
        framework.
    """
    model = model_provider()
    return model.eval() if model is not None else None


def print_rank_0(message: str) -> None:
    """Print on the first rank of a replica only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(message, flush=True)
