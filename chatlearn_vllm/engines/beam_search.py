"""How are the most probable responses to a prompt searched, with an engine that makes one token?

vLLM's `LLM.beam_search` in steps, for an engine that works on other requests too: each step asks
for the 2 x beam_width most probable next tokens of every beam, candidates that end are complete,
the best of the others go on; the search ends with the last beam or at `max_tokens`. The score is
vLLM's too: log-probability / length ** length_penalty, where the length counts the prompt and not
the ending token (vllm/entrypoints/generate/beam_search, in 0.25 vllm/beam_search.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from chatlearn_vllm.engines.request_output import BeamOutput, Logprob, RequestOutput


@dataclass(frozen=True)
class BeamSearchKeys:
    """What a request for beams says; names and meanings of `vllm.BeamSearchParams`."""

    beam_width: int
    max_tokens: int
    n: int = 1
    """Beams that are returned, the best first."""
    length_penalty: float = 1.0
    """More than 1 prefers long responses, less than 1 short ones."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True

    @classmethod
    def of(cls, sampling: Mapping[str, Any]) -> BeamSearchKeys:
        """Read the keys of a request.

        Raises:
            ValueError: beam search has no such key, or a value is none that it takes.
        """
        given = {name: value for name, value in sampling.items() if name not in ("seed",)}
        if unknown := sorted(given.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"{', '.join(unknown)}: no key of a beam search; leave it out")
        keys = cls(**given)
        if keys.beam_width < 1 or keys.max_tokens < 1:
            raise ValueError(
                f"beam_width={keys.beam_width} and max_tokens={keys.max_tokens} must be at least 1"
            )
        if not 1 <= keys.n <= keys.beam_width:
            raise ValueError(f"n={keys.n} beams of beam_width={keys.beam_width}")
        return replace(keys, stop_token_ids=tuple(keys.stop_token_ids))


@dataclass(frozen=True)
class Beam:
    """The beginning of a response, or a whole one."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    cumulative_logprob: float = 0.0
    stop_token: int | None = None
    """The last token, if it ended the response."""

    def score(self, prompt_length: int, length_penalty: float) -> float:
        """By which beams are compared."""
        length = prompt_length + len(self.token_ids) - (self.stop_token is not None)
        return self.cumulative_logprob / max(length, 1) ** length_penalty


class BeamSearch:
    """The search for one prompt."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        keys: BeamSearchKeys,
        eos_token_ids: Sequence[int],
    ) -> None:
        """Begin with the empty response.

        Args:
            request_id: of the search.
            prompt: its text.
            prompt_token_ids: what the model sees of it.
            keys: what is asked for.
            eos_token_ids: the model's end-of-sequence tokens, the tokenizer's first.
        """
        self.request_id = request_id
        self._prompt, self._prompt_token_ids = prompt, list(prompt_token_ids)
        self._keys = keys
        ending = () if keys.ignore_eos else eos_token_ids
        self._eos_token_id = next(iter(ending), None)
        self._ends = frozenset((*ending, *keys.stop_token_ids))
        self._beams = [Beam()]
        self._complete: list[Beam] = []
        self._answers: dict[int, Mapping[int, Any]] = {}
        self._num_steps = 0

    @property
    def is_finished(self) -> bool:
        """Whether no beam goes on."""
        return not self._beams or self._num_steps == self._keys.max_tokens

    @property
    def open_ids(self) -> list[str]:
        """The requests of this step that have no answer yet."""
        return [self._id_of(i) for i in range(len(self._beams)) if i not in self._answers]

    def requests(self) -> list[tuple[str, list[int], dict[str, Any]]]:
        """Ids, prompts and sampling keys of one step's requests, for one token each."""
        sampling = {
            "temperature": 0.0,
            "max_tokens": 1,
            "logprobs": 2 * self._keys.beam_width,
            "detokenize": False,
            "ignore_eos": True,
        }
        return [
            (self._id_of(index), [*self._prompt_token_ids, *beam.token_ids], dict(sampling))
            for index, beam in enumerate(self._beams)
        ]

    def note(self, request_id: str, logprobs: Mapping[int, Any]) -> bool:
        """Take the most probable next tokens of a beam.

        Args:
            request_id: of the beam's request.
            logprobs: the tokens, with `logprob` each.

        Returns:
            Whether the step is complete, and `requests` gives the next one's.
        """
        self._answers[int(request_id.rpartition("#")[2])] = logprobs
        if len(self._answers) < len(self._beams):
            return False
        going_on = []
        for index, beam in enumerate(self._beams):
            for token, entry in self._answers[index].items():
                ends = token in self._ends
                new = Beam(
                    (*beam.token_ids, token),
                    (*beam.logprobs, entry.logprob),
                    beam.cumulative_logprob + entry.logprob,
                    token if ends else None,
                )
                (self._complete if ends else going_on).append(new)
        self._beams = self._best(going_on, self._keys.beam_width)
        self._answers = {}
        self._num_steps += 1
        return True

    def output(self, decode: Callable[[list[int], bool], str]) -> RequestOutput:
        """The best beams, the best first.

        Args:
            decode: makes text of token ids; the flag says whether special tokens are left out.
        """
        best = self._best([*self._complete, *self._beams], self._keys.n)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=None,
            outputs=[self._completion(index, beam, decode) for index, beam in enumerate(best)],
            finished=True,
        )

    def _best(self, beams: list[Beam], number: int) -> list[Beam]:
        return sorted(beams, key=self._score, reverse=True)[:number]

    def _score(self, beam: Beam) -> float:
        return beam.score(len(self._prompt_token_ids), self._keys.length_penalty)

    def _completion(
        self, index: int, beam: Beam, decode: Callable[[list[int], bool], str]
    ) -> BeamOutput:
        shown = beam.token_ids[: -1 if beam.stop_token is not None else None]
        is_eos = beam.stop_token == self._eos_token_id
        return BeamOutput(
            index=index,
            text=decode(list(shown), self._keys.skip_special_tokens),
            token_ids=list(beam.token_ids),
            cumulative_logprob=beam.cumulative_logprob,
            logprobs=[
                {token: Logprob(logprob)}
                for token, logprob in zip(beam.token_ids, beam.logprobs, strict=True)
            ],
            finish_reason="length" if beam.stop_token is None else "stop",
            stop_reason=None if is_eos else beam.stop_token,
            score=self._score(beam),
        )

    def _id_of(self, index: int) -> str:
        return f"{self.request_id}#{index}"
