"""How many seconds did each phase of an episode take?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimers:
    """Wall-clock seconds per named phase.

    Example:
        with timers.phase("rollout"):
            ...
        timers.take()  # {"rollout": 1.25}; the next episode starts at zero
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the `with` body to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self.seconds(name) + time.perf_counter() - start

    def seconds(self, name: str) -> float:
        """Seconds of phase `name` since the last `take`; 0.0 if it did not run."""
        return self._seconds.get(name, 0.0)

    def take(self) -> dict[str, float]:
        """Return the seconds of all phases that ran, and start again at zero."""
        taken, self._seconds = self._seconds, {}
        return taken
