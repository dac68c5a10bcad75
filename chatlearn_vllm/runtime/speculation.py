"""Do drafts pay in a job's rollouts, and when is drafting switched off and on?"""

from __future__ import annotations

from chatlearn_vllm.engines.speculation import SpeculationStats
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime.worker_group import WorkerGroup

logger = get_logger(__name__)

PATIENCE = 2
"""Rollouts in a row that must say the same before anything is switched."""
MARGIN = 1.05
"""Times speculative_min_gain that drafts must be worth to be switched on again."""


class SpeculationSwitch:
    """Watches what drafting gains, rollout by rollout, and switches it for the next ones.

    A switched-off engine goes on comparing a few steps of each rollout, now with drafts, so that a
    policy that becomes predictable is drafted for again.
    """

    def __init__(self, policy: WorkerGroup, min_gain: float) -> None:
        """Begin with drafts.

        Args:
            policy: ranks of a `VLLMModule` with speculative_config.
            min_gain: see `speculative_min_gain`; 0 leaves drafting on.
        """
        self._policy = policy
        self._min_gain = min_gain
        self._is_on = True
        self._gains: list[float] = []
        """Since the last switch."""

    def after_rollout(self, weight_version: int) -> dict[str, float]:
        """Ask the ranks what drafting did, and switch it if that says so.

        Args:
            weight_version: of the weights that drafts were verified with.

        Returns:
            Metrics of the rollout; those of drafts only if there were any.
        """
        stats = self._take_stats()
        metrics = {"rollout/spec_enabled": float(self._is_on)}
        metrics |= speculation_metrics(stats, "rollout")
        if stats.gain is not None and self._min_gain > 0:
            self._gains = [*self._gains, stats.gain][-PATIENCE:]
            if self._should_switch():
                self._switch(stats, weight_version)
        return metrics

    def after_evaluation(self) -> dict[str, float]:
        """What drafting did in an evaluation, as metrics."""
        return speculation_metrics(self._take_stats(), "eval")

    def _take_stats(self) -> SpeculationStats:
        of_ranks = self._policy.call("take_speculation_stats")
        # The ranks of a replica count the same.
        return sum(of_ranks[:: len(self._policy.replicas[0])], SpeculationStats())

    def _should_switch(self) -> bool:
        if len(self._gains) < PATIENCE:
            return False
        if self._is_on:
            return max(self._gains) < self._min_gain
        return min(self._gains) >= self._min_gain * MARGIN

    def _switch(self, stats: SpeculationStats, weight_version: int) -> None:
        self._is_on = not self._is_on
        accepted = "no" if stats.acceptance_rate is None else f"{stats.acceptance_rate:.0%} of the"
        logger.info(
            "%s: %s: generating with drafts was %s times as fast as without in the last rollouts "
            "(speculative_min_gain: %g); %s drafted tokens accepted with weight version %d",
            self._policy.name,
            "drafts again from now on" if self._is_on else "no drafts from now on",
            " and ".join(f"{gain:.2f}" for gain in self._gains),
            self._min_gain,
            accepted,
            weight_version,
        )
        self._policy.call("set_speculation", self._is_on)
        self._gains = []


def speculation_metrics(stats: SpeculationStats, prefix: str) -> dict[str, float]:
    """What is known of the drafts of a rollout or an evaluation."""
    values = {
        f"{prefix}/spec_drafts": stats.num_drafts,
        f"{prefix}/spec_acceptance_rate": stats.acceptance_rate,
        f"{prefix}/spec_accepted_length": stats.accepted_length,
        f"{prefix}/spec_gain": stats.gain,
    }
    return {name: float(value) for name, value in values.items() if value is not None}
