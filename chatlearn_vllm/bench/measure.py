"""How do times become numbers?"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from chatlearn_vllm.bench.workload import Prompt

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` percent of the values lie, linear between neighbours.

    Args:
        values: at least one.
        share: between 0 and 100.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    return {
        "mean": fmean(values),
        **{f"p{share}": percentile(values, share) for share in PERCENTILES},
        "num": len(values),
    }


@dataclass(frozen=True)
class Pass:
    """One measured run over some prompts."""

    seconds: float
    completions: int
    output_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.seconds


def throughput(passes: Sequence[Pass], num_completions: int) -> dict[str, Any]:
    """What the passes of a case say, by their median.

    Args:
        passes: at least one, each of at most `num_completions` completions.
        num_completions: that were asked for. Where a pass has fewer, the time for all is computed
            from it, and `is_scaled` says so.
    """
    middle = median(one.tokens_per_s for one in passes)
    per_completion = median(one.seconds / one.completions for one in passes)
    measured = min(one.completions for one in passes)
    return {
        "output_tokens_per_s": middle,
        "requests_per_s": 1 / per_completion,
        "seconds_for_all": per_completion * num_completions,
        "completions": num_completions,
        "measured_completions": measured,
        "is_scaled": measured < num_completions,
        "passes": [
            {
                "seconds": one.seconds,
                "completions": one.completions,
                "output_tokens": one.output_tokens,
                "output_tokens_per_s": one.tokens_per_s,
            }
            for one in passes
        ],
    }


@dataclass
class Stopwatch:
    """When the tokens of requests came, all of which were sent at the same time."""

    start: float = field(default_factory=time.perf_counter)
    first: dict[Any, float] = field(default_factory=dict)
    """Seconds from the start to a request's first token."""
    last: dict[Any, float] = field(default_factory=dict)
    """Likewise, to its last one so far."""
    between: list[float] = field(default_factory=list)
    """Seconds from each token to the next one of the same request."""

    def tokens(self, request: Any, num_new: int) -> None:
        """Note tokens that came just now; several at once share the time since the last."""
        if num_new < 1:
            return
        now = time.perf_counter() - self.start
        if request in self.first:
            self.between += [(now - self.last[request]) / num_new] * num_new
        else:
            self.first[request] = now
        self.last[request] = now


def latency(watches: Sequence[Stopwatch]) -> dict[str, Any]:
    """Time to first token, between tokens and of whole requests, in seconds, over all requests."""
    first = [seconds for watch in watches for seconds in watch.first.values()]
    return {
        "ttft_s": summary(first),
        "inter_token_s": summary([gap for watch in watches for gap in watch.between]),
        "request_s": summary([seconds for watch in watches for seconds in watch.last.values()]),
        "num_requests": len(first),
    }


class Stream(Protocol):
    """Sends requests together and waits for all of them."""

    def __call__(self, prompts: list[Prompt], completions: int, first: int = 0) -> Stopwatch:
        """Note when tokens come.

        Args:
            prompts: of the requests.
            completions: per prompt.
            first: number of the first prompt among those of this kind, for the seeds.
        """


def latencies(
    stream: Stream, alone: Sequence[Prompt], together: list[Prompt], completions: int
) -> dict[str, Any]:
    """Those of requests that have the engine to themselves, and of others that are sent together.

    Args:
        stream: sends them.
        alone: prompts of the former, each with one completion.
        together: prompts of the latter.
        completions: per prompt of the latter.
    """
    return {
        "alone": latency([stream([one], 1, number) for number, one in enumerate(alone)]),
        "loaded": latency([stream(together, completions)]),
    }


def acceptance(drafts: float, draft_tokens: float, accepted_tokens: float) -> dict[str, Any]:
    """Counts of drafts, of the tokens in them and of those accepted, and what they say."""
    return {
        "drafts": drafts,
        "draft_tokens": draft_tokens,
        "accepted_tokens": accepted_tokens,
        "acceptance_rate": accepted_tokens / draft_tokens if draft_tokens else None,
        "mean_accepted_length": 1 + accepted_tokens / drafts if drafts else None,
    }


def of_rounds(earlier: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """A case's results of several rounds as those of one.

    All passes and drafts count, and the largest memory; the rest, latencies too, is the last
    round's.
    """
    passes = [
        Pass(made["seconds"], made["completions"], made["output_tokens"])
        for one in (earlier, last)
        for made in one["throughput"]["passes"]
    ]
    found = {
        **last,
        "throughput": throughput(passes, last["throughput"]["completions"]),
        "memory": _largest(earlier["memory"], last["memory"]),
    }
    if last["speculation"] is not None:
        counts = [
            earlier["speculation"][name] + last["speculation"][name]
            for name in ("drafts", "draft_tokens", "accepted_tokens")
        ]
        found["speculation"] = {**last["speculation"], **acceptance(*counts)}
    return found


def _largest(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks of memory over both."""
    device = one["device_bytes"], other["device_bytes"]
    return {
        "device_bytes": [max(pair) for pair in zip(*device, strict=True)] if all(device) else None,
        "host_rss_bytes": max(one["host_rss_bytes"], other["host_rss_bytes"]),
    }
