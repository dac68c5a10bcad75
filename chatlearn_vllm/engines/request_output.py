"""What does an engine other than vLLM answer a request with?

The attributes are those of `vllm.RequestOutput` that `data/rollouts.py` and users' modules read, so
a module's `decode_internal` does not see which engine answered, and vLLM need not be installed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token at one place."""

    logprob: float
    rank: int | None = None
    """1 for the most probable token; None where it was not counted."""
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One response."""

    index: int
    """Among the responses to the prompt."""
    text: str
    """Without the stop string."""
    token_ids: list[int]
    """A stop token included."""
    cumulative_logprob: float | None
    """Sum over `token_ids`."""
    logprobs: list[dict[int, Logprob]] | None
    """Per token of `token_ids`; None if they were not asked for."""
    finish_reason: str | None = None
    """`stop` or `length`; None while it goes on."""
    stop_reason: int | str | None = None
    """The stop string or token id; None for the end-of-sequence token and the length limit."""

    def finished(self) -> bool:
        """Whether the response is complete."""
        return self.finish_reason is not None


@dataclass
class BeamOutput(CompletionOutput):
    """One response of a beam search."""

    score: float = 0.0
    """By which beams are compared: log-probability / length ** length_penalty."""


@dataclass
class RequestOutput:
    """A prompt and its responses."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """Per token of the prompt, None for the first; None if they were not asked for."""
    outputs: list[CompletionOutput]
    finished: bool
