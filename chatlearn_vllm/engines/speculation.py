"""How many drafts are accepted, and how much faster are steps with drafts than steps without?

A few steps of each rollout are run the other way, without drafts while drafting is on and with
drafts while it is off, and compared with the steps just before and after them: the same requests,
the same batch, on the same device. Which steps these are follows from their number alone, so that
all ranks of a replica, which schedule for themselves, switch at the same one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

WINDOW = 16
"""Steps of each kind that are compared with each other."""
SETTLING = 3
"""Steps after a switch that do not count: with async scheduling they were scheduled before it."""
PERIOD = 256
"""Steps from the beginning of one comparison to that of the next."""
_LENGTH = SETTLING + WINDOW
_BEFORE, _DURING, _AFTER = range(3)
"""Parts of a comparison, each of `_LENGTH` steps; those during it are run the other way."""


@dataclass
class SpeculationStats:
    """Counts of one rank; those of several may be added."""

    num_drafts: int = 0
    """Drafts that were verified, one per request and step."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    drafted_tokens: int = 0
    """Tokens generated in the compared steps with drafts."""
    drafted_seconds: float = 0.0
    plain_tokens: int = 0
    """Tokens generated in the compared steps without."""
    plain_seconds: float = 0.0

    def __add__(self, other: SpeculationStats) -> SpeculationStats:
        names = [one.name for one in fields(self)]
        return SpeculationStats(*(getattr(self, n) + getattr(other, n) for n in names))

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that were accepted; None if none were drafted."""
        drafted = self.num_draft_tokens
        return self.num_accepted_tokens / drafted if drafted else None

    @property
    def accepted_length(self) -> float | None:
        """Mean tokens that a verified draft gave, with the one that the model adds itself."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    @property
    def gain(self) -> float | None:
        """Tokens per second with drafts over tokens per second without; None if not compared."""
        if not (self.drafted_tokens and self.plain_tokens):
            return None
        drafted = self.drafted_tokens / self.drafted_seconds
        return drafted / (self.plain_tokens / self.plain_seconds)


@dataclass
class _Window:
    """Steps of one kind in a row."""

    is_drafted: bool
    num_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class StepCount:
    """What the step at hand did."""

    tokens: int = 0
    """Generated."""
    prompt_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass
class Speculation:
    """The drafting of one engine: on or off, and what it was seen to do."""

    switch: Callable[[bool], None]
    """Has the engine draft in its next steps, or not."""
    goes_on_because: str | None = None
    """Why steps without drafts cost no less, so that there is nothing to compare; None: they do."""
    is_on: bool = True
    """Whether most steps draft."""
    measures: bool = True
    """Whether some steps are run the other way."""
    step_count: StepCount = field(default_factory=StepCount)
    """Written to while a step runs."""
    _stats: SpeculationStats = field(default_factory=SpeculationStats)
    _windows: list[_Window] = field(default_factory=list)
    _step: int = 0
    _drafts: bool = True
    """What the engine does now."""
    _is_eval: bool = False

    def begin(self, *, is_eval: bool, measures: bool) -> None:
        """Before each part of a rollout or an evaluation; forgets the counts of the other kind.

        Args:
            is_eval: an evaluation; nothing is compared in it.
            measures: whether some steps of a rollout are run the other way.
        """
        if is_eval != self._is_eval:
            self._is_eval = is_eval
            self.take_stats()
        self.measures = measures and not is_eval

    def set_on(self, is_on: bool) -> None:
        """Draft from the next step on, or not; between two rollouts.

        Raises:
            ValueError: an engine that has to draft is asked not to.
        """
        self._draft(is_on)
        self.is_on = is_on
        self._begin_anew()

    def take_stats(self) -> SpeculationStats:
        """What was counted since the last time."""
        stats, self._stats = self._stats, SpeculationStats()
        self._begin_anew()
        return stats

    def _begin_anew(self) -> None:
        self._step, self._windows = 0, []
        self._draft(self.is_on)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step of the engine."""
        part, place = divmod(self._step % PERIOD, _LENGTH)
        compares = self.measures and self.goes_on_because is None
        self._draft(self.is_on != (compares and part == _DURING))
        self.step_count = count = StepCount()
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._step += 1
        self._stats.num_drafts += count.num_drafts
        self._stats.num_draft_tokens += count.num_draft_tokens
        self._stats.num_accepted_tokens += count.num_accepted_tokens
        if compares and part <= _AFTER:
            self._note(part, place, count, seconds)

    def _draft(self, drafts: bool) -> None:
        if drafts != self._drafts:
            self.switch(drafts)
            self._drafts = drafts

    def _note(self, part: int, place: int, count: StepCount, seconds: float) -> None:
        """Add a step to the part of the comparison that it belongs to."""
        if place == 0:
            before = self._windows if part != _BEFORE else []
            self._windows = [*before, _Window(self._drafts)]
        # Steps that work on prompts, too, say little about either kind.
        if place >= SETTLING and self._windows and count.tokens and not count.prompt_tokens:
            window = self._windows[-1]
            window.num_steps += 1
            window.tokens += count.tokens
            window.seconds += seconds
        if part == _AFTER and place == _LENGTH - 1:
            self._compare()

    def _compare(self) -> None:
        """Add the windows before, during and after to the stats, unless one says too little.

        What is before counts as much as what is after, so that it does not matter that there are
        ever fewer requests.
        """
        if len(self._windows) != 3 or any(w.num_steps < WINDOW // 2 for w in self._windows):
            return
        for window in self._windows:
            if window.is_drafted:
                self._stats.drafted_tokens += window.tokens
                self._stats.drafted_seconds += window.seconds
            else:
                self._stats.plain_tokens += window.tokens
                self._stats.plain_seconds += window.seconds


def bind_step_counter(speculation: Speculation) -> Callable[[Any, int], Any]:
    """Make what vLLM takes in `stat_loggers`: it tells `speculation` what each step did."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StepCounter(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
        ) -> None:
            count = speculation.step_count
            if iteration_stats is not None:
                count.tokens += iteration_stats.num_generation_tokens
                count.prompt_tokens += iteration_stats.num_prompt_tokens
            drafts = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
            if drafts is not None:
                count.num_drafts += drafts.num_drafts
                count.num_draft_tokens += drafts.num_draft_tokens
                count.num_accepted_tokens += drafts.num_accepted_tokens

        def log_engine_initialized(self) -> None:
            pass

    return StepCounter
