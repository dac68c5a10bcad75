"""Has somebody asked this job to end?"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from chatlearn_vllm.observability.logging import get_logger

logger = get_logger(__name__)


class StopRequest:
    """Within the block SIGTERM asks for an end at the next good moment, instead of ending at once.

    A second SIGTERM ends at once. Outside the main thread, where Python allows no handlers, the
    block changes nothing.

    Example:
        with StopRequest() as stop:
            while not stop.is_made:
                work()
    """

    def __init__(self) -> None:
        self.is_made = False
        """Whether SIGTERM has come."""
        self._before: Any = None

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
        logger.warning("SIGTERM: the job saves and ends as soon as this step is over")
