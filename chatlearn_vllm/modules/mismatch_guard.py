"""Which differences between rollout and trainer are worth a warning, and which end the job?"""

from __future__ import annotations

from collections.abc import Mapping

WARN_INTERVAL = 10
"""Episodes for which a metric that was warned about stays silent."""

CAUSES = (
    "likely causes: rollout weights that are not the trainer's (sync_frequency, a user hook that "
    "writes weights), different dtype or kernels on the two sides, or sampling that changes log "
    "probabilities (temperature, top_p, top_k, min_p, penalties)"
)


class MismatchError(RuntimeError):
    """The rollout's log-probabilities are too far from the trainer's to train on."""


class MismatchGuard:
    """Compares an episode's mismatch metrics with the levels of the yaml.

    Example:
        guard = MismatchGuard(warn={"rollout_kl": 0.01}, stop={})
        guard.warnings({"rollout_kl": 0.02}, episode=1, weight_version=1)
    """

    def __init__(self, warn: Mapping[str, float], stop: Mapping[str, float]) -> None:
        """Keep the levels, by metric: `runtime.mismatch_warn` and `runtime.mismatch_stop`."""
        self._warn = dict(warn)
        self._stop = dict(stop)
        self._warned_in: dict[str, int] = {}

    def warnings(
        self, metrics: Mapping[str, float], episode: int, weight_version: int | None
    ) -> list[str]:
        """Judge one episode; call it once for each.

        Args:
            metrics: as `algorithms.mismatch.mismatch_metrics` returns them.
            episode: its number.
            weight_version: of the weights that sampled the episode; None if it is not known.

        Returns:
            One sentence for each metric above its warn level that was not warned about in the
            last `WARN_INTERVAL` episodes.

        Raises:
            MismatchError: a metric is above its stop level.
        """
        where = f"episode {episode}, rollouts of weight version {weight_version}"
        above = [
            f"{name}={metrics[name]:.4g} is above runtime.mismatch_stop.{name}={level:g}"
            for name, level in self._stop.items()
            if metrics[name] > level
        ]
        if above:
            raise MismatchError(
                f"{where}: {'; '.join(above)}. No optimizer step was made. {CAUSES}. "
                "Remove the cause, or raise the level"
            )
        messages = []
        for name, level in self._warn.items():
            last = self._warned_in.get(name)
            if metrics[name] > level and (last is None or episode - last >= WARN_INTERVAL):
                self._warned_in[name] = episode
                messages.append(
                    f"{where}: {name}={metrics[name]:.4g} is above "
                    f"runtime.mismatch_warn.{name}={level:g}; {CAUSES}"
                )
        return messages
