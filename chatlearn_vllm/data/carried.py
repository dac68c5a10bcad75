"""What is left of a rollout when it ends before all of its responses are finished?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from chatlearn_vllm.data.batch import Batch


@dataclass
class Begun:
    """A response as far as it has come; finished if it has a `finish_reason`."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """log p of each token under the weights that sampled it."""
    versions: list[int] = field(default_factory=list)
    """Weight version that sampled each token."""
    finish_reason: str | None = None
    """vLLM's: "stop" or "length"."""
    stop_reason: int | str | None = None
    """vLLM's: the stop string or token, None for the end-of-sequence token."""


@dataclass(frozen=True)
class Asked:
    """What a request in the engine stands for."""

    prompt_index: int
    first_sample: int
    """Ordinal of its first response."""
    record: dict[str, Any]
    """Of the dataset."""
    begun: list[Begun]
    """With partial rollouts its responses so far."""


@dataclass
class Carried:
    """A prompt whose responses go on in the next episode."""

    prompt_index: int
    first_sample: int
    """Ordinal of the first of its responses over the whole job."""
    num_rounds: int
    """Episodes that have worked on it."""
    responses: list[Begun]
    """Empty if none of them has been begun."""

    def state_dict(self) -> dict[str, Any]:
        """As plain values; lists of tokens are not copied, nobody changes them on the driver."""
        return {**vars(self), "responses": [dict(vars(begun)) for begun in self.responses]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Carried:
        """Of `state_dict`."""
        return cls(**{**state, "responses": [Begun(**begun) for begun in state["responses"]]})


def version_lags(batch: Batch) -> torch.Tensor:
    """How many weight versions lie between each sampled token and the end of its rollout.

    Args:
        batch: with `token_versions` [B, S-1] and `weight_version` [B].

    Returns:
        [N] int64, one entry per sampled token.
    """
    lags = batch["weight_version"][:, None] - batch["token_versions"]
    return lags[batch["loss_mask"][:, 1:] != 0]


def carried_metrics(batch: Batch, carried: Iterable[Carried]) -> dict[str, float]:
    """How far off-policy an episode's samples are, and what goes on in the next one.

    Args:
        batch: the episode's samples, see `version_lags`.
        carried: what they left behind.
    """
    lags = version_lags(batch).double()
    return {
        "rollout/version_lag_mean": lags.mean().item() if len(lags) else 0.0,
        "rollout/version_lag_max": lags.max().item() if len(lags) else 0.0,
        "rollout/off_policy_fraction": (lags > 0).double().mean().item() if len(lags) else 0.0,
        "rollout/num_carried_prompts": len(list(carried)),
    }
