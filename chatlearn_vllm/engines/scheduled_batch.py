"""What does `forward_step` see of a batch where no vLLM scheduler made it?

The attributes are those of vLLM's `SchedulerOutput` that say which request is how far, so a module
reads them without knowing which engine generates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class NewRequest:
    """A response that the batch begins."""

    req_id: str
    prompt_token_ids: list[int]
    num_computed_tokens: int = 0
    prefill_token_ids: None = None
    """What vLLM's newer model runner is told of a response that begins again; here none does."""


@dataclass(frozen=True)
class CachedRequests:
    """Responses that go on; none, where a batch answers whole requests."""

    req_ids: list[str] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ScheduledBatch:
    """Whole responses that are generated together."""

    scheduled_new_reqs: Sequence[NewRequest]
    scheduled_cached_reqs: CachedRequests = field(default_factory=CachedRequests)

    @property
    def num_scheduled_tokens(self) -> dict[str, int]:
        """Tokens of each prompt, by request id."""
        return {new.req_id: len(new.prompt_token_ids) for new in self.scheduled_new_reqs}

    @property
    def total_num_scheduled_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(self.num_scheduled_tokens.values())
