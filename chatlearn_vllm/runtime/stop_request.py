"""Has somebody asked this job to end?"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from chatlearn_vllm.observability.logging import get_logger

logger = get_logger(__name__)


class AbandonedError(BaseException):
    """SIGTERM came while a job did what can be done again: see `StopRequest.abandons`."""


class StopRequest:
    """Within the block SIGTERM asks for an end at the next good moment, instead of ending at once.

    A second SIGTERM ends at once, and so does one after which the job cannot go on. Outside the
    main thread, where Python allows no handlers, the block changes nothing.

    Example:
        with StopRequest() as stop:
            while not stop.is_made:
                with stop.abandons():
                    data = prepare()
                learn(data)
    """

    def __init__(self, can_go_on: Callable[[], bool] = lambda: True) -> None:
        """Make a request that nobody has made yet.

        Args:
            can_go_on: asked when SIGTERM comes: whether what the job needs has outlived it. A
                signal to a whole process group, as `timeout` sends it, reaches Ray, too.
        """
        self.is_made = False
        """Whether SIGTERM has come."""
        self._can_go_on = can_go_on
        self._abandons = False
        self._before: Any = None

    @contextmanager
    def abandons(self) -> Iterator[None]:
        """Within the block, which changes nothing that lasts, SIGTERM does not wait for its end.

        Raises:
            AbandonedError: SIGTERM has come, now or before.
        """
        self._abandons = True
        try:
            if self.is_made:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            if not self.is_made:
                raise
            raise AbandonedError from None
        finally:
            self._abandons = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, self._before)
        self.is_made = True
        if not self._can_go_on():
            logger.warning(
                "SIGTERM to all processes: Ray has ended, so nothing can be saved. "
                "Send it to the driver's process alone (timeout --foreground; kill PID)"
            )
            raise SystemExit(128 + number)
        if self._abandons:
            logger.warning("SIGTERM: the job leaves this episode, saves the last one and ends")
            raise KeyboardInterrupt  # while it waits, Ray lets no exception of ours through
        logger.warning("SIGTERM: the job saves and ends as soon as this episode is over")
