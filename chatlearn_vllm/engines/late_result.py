"""What does vLLM hold while something is still to be done with a step's output?

It only asks such a future for its result.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class LateResult(Future):
    """A future whose result is made when it is asked for, once."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self._make = make

    def result(self, timeout: float | None = None) -> Any:
        """What `make` returns, or raises."""
        if not self.done():
            self.set_result(self._make())
        return super().result(timeout)
