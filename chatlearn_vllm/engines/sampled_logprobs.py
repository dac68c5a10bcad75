"""How do log-probabilities of sampled tokens leave vLLM without Python objects for each of them?

The model executor hands them over once per step, as one array for all requests. vLLM would cut it
into a slice per request, and each slice into further objects: some 10 us a token, on the thread
that schedules. Here the array is taken on its way from the executor to the scheduler and written
into a table with a row for each running response; what belongs to a response is cut out of it when
that is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from chatlearn_vllm.engines.late_result import LateResult
from chatlearn_vllm.engines.vllm_compat import split_request_id

_ENTRY = np.dtype([("token", np.int32), ("logprob", np.float32), ("rank", np.int32)])
"""What is kept of a token."""
_GONE = -1
"""Row of a request whose tokens nobody waits for."""


class TokenLogprobs(Sequence):
    """`CompletionOutput.logprobs` of a response: vLLM's dicts, made of an array when read."""

    def __init__(self, entries: np.ndarray) -> None:
        self._entries = entries

    @classmethod
    def of(cls, token_ids: list[int], logprobs: list[float]) -> TokenLogprobs:
        """Of tokens whose ranks nobody kept."""
        entries = np.zeros(len(token_ids), dtype=_ENTRY)
        entries["token"], entries["logprob"] = token_ids, logprobs
        return cls(entries)

    @property
    def logprobs(self) -> list[float]:
        """Those of all tokens at once, as in vLLM's `FlatLogprobs`."""
        return self._entries["logprob"].tolist()

    @property
    def ranks(self) -> list[int]:
        """Of all tokens, 1 for the likeliest; 0 where it is not known."""
        return self._entries["rank"].tolist()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return TokenLogprobs(self._entries[index])
        from vllm.logprobs import Logprob

        token, logprob, rank = self._entries[index].item()
        return {token: Logprob(logprob, rank or None)}


class SampledLogprobs:
    """What came so far, of requests that asked for `logprobs=0`."""

    def __init__(self) -> None:
        self._num_responses: dict[str, int] = {}
        self._table = np.empty((0, 0), dtype=_ENTRY)
        """[rows, tokens] of running responses; a row is given away again when it was read."""
        self._lengths = np.empty(0, dtype=np.int64)
        """[rows], how much of each is filled."""
        self._free: list[int] = []
        self._row_of: dict[tuple[str, int], int] = {}
        """By request and number of the response."""
        self._row_of_vllm: dict[str, int] = {}
        """By vLLM's own request ids, of all that were seen."""
        self._vllm_id_of: dict[int, str] = {}
        self._last: tuple[list[str], np.ndarray] | None = None
        """vLLM's ids of the last step, and their rows."""

    def expect(self, request_id: str, num_responses: int) -> None:
        """A request is about to be added under this id."""
        self._num_responses[request_id] = num_responses

    def take_from(self, output: Any) -> Any:
        """Take what a step sampled out of its output.

        Args:
            output: `vllm.v1.outputs.ModelRunnerOutput`, None, or a future of one.

        Returns:
            The output for vLLM's scheduler.
        """
        if isinstance(output, Future):
            return LateResult(lambda: self.take_from(output.result()))
        if getattr(output, "logprobs", None) is None:
            return output
        lists, output.logprobs = output.logprobs, None
        ids = output.req_ids
        counts = np.fromiter(map(len, output.sampled_token_ids), dtype=np.int64, count=len(ids))
        rows = self._rows(ids)
        came = (counts > 0) & (rows != _GONE)
        # Where each request's tokens begin: several of one may have come, those that were drafted.
        begins = lists.cu_num_generated_tokens
        if begins is None and counts.max(initial=0) > 1:
            raise RuntimeError("vLLM does not say which log-probabilities are of which request")
        first = np.arange(len(ids)) if begins is None else np.array(begins[: len(ids)])
        rows, first, counts = rows[came], first[came], counts[came]
        if not rows.size:
            return output
        lengths = self._lengths[rows]
        while (lengths + counts).max() > self._table.shape[1]:
            self._resize(len(self._table), 2 * self._table.shape[1])
        self._lengths[rows] += counts
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        at = np.repeat(rows, counts), np.repeat(lengths, counts) + number
        of = np.repeat(first, counts) + number
        self._table["token"][at] = lists.logprob_token_ids[of, 0]
        self._table["logprob"][at] = lists.logprobs[of, 0]
        self._table["rank"][at] = lists.sampled_token_ranks[of]
        return output

    def fill(self, output: Any) -> None:
        """Write the log-probabilities into a finished `vllm.RequestOutput`.

        Raises:
            RuntimeError: a token's never came.
        """
        for completion in output.outputs:
            kept = self._take(output.request_id, completion.index, list(completion.token_ids))
            completion.cumulative_logprob = float(kept["logprob"].sum(dtype=np.float64))
            completion.logprobs = TokenLogprobs(kept)

    def take(self, request_id: str, token_ids: list[int]) -> list[float]:
        """The log-probabilities of the tokens of a request with one response, which is over.

        Raises:
            RuntimeError: a token's never came.
        """
        return self._take(request_id, 0, token_ids)["logprob"].tolist()

    def _take(self, request_id: str, index: int, token_ids: list[int]) -> np.ndarray:
        row = self._row_of.pop((request_id, index), None)
        found = np.empty(0, dtype=_ENTRY)
        if row is not None:
            found = self._table[row, : self._lengths[row]].copy()
            self._give_away(row)
        kept = _matching(found, token_ids)
        if kept is None:
            raise RuntimeError(
                f"request {request_id}: vLLM answers with {len(token_ids)} tokens, of which the "
                f"executor has handed over {len(found)}"
            )
        return kept

    def _rows(self, vllm_ids: list[str]) -> np.ndarray:
        """Row of each request of a step; most steps have the requests of the last one."""
        if self._last is None or self._last[0] != vllm_ids:
            for vllm_id in vllm_ids:
                if vllm_id not in self._row_of_vllm:
                    self._note_first(vllm_id)
            # Now, because a new request may have taken over the row of one that is gone.
            rows = np.array([self._row_of_vllm[one] for one in vllm_ids], dtype=np.int64)
            self._last = list(vllm_ids), rows
        return self._last[1]

    def _note_first(self, vllm_id: str) -> None:
        """Give a request that is seen for the first time a row."""
        row = _GONE
        if name := split_request_id(vllm_id, self._num_responses):
            # A request of this id that was dropped before may still have had a token coming.
            if (before := self._row_of.pop(name, None)) is not None:
                self._give_away(before)
            if not self._free:
                self._resize(2 * len(self._table), self._table.shape[1])
            row = self._row_of[name] = self._free.pop()
            self._vllm_id_of[row] = vllm_id
            self._lengths[row] = 0
        self._row_of_vllm[vllm_id] = row

    def _give_away(self, row: int) -> None:
        """Let another response have a row; tokens still in flight for this one go nowhere."""
        self._row_of_vllm[self._vllm_id_of.pop(row)] = _GONE
        self._free.append(row)
        self._last = None

    def _resize(self, num_rows: int, num_tokens: int) -> None:
        old = self._table
        self._table = np.zeros((max(num_rows, 16), max(num_tokens, 64)), dtype=_ENTRY)
        self._table[: old.shape[0], : old.shape[1]] = old
        lengths = np.zeros(len(self._table), dtype=np.int64)
        lengths[: len(old)] = self._lengths
        self._lengths = lengths
        self._free += range(len(old), len(self._table))


def _matching(found: np.ndarray, token_ids: list[int]) -> np.ndarray | None:
    """Of what was sampled, that which the answer is made of; None if something is missing.

    vLLM drops tokens that were sampled after a response had ended, or before it was computed anew.
    """
    count = len(token_ids)
    if found["token"][:count].tolist() == token_ids:
        return found[:count]
    kept = []
    sampled = enumerate(found["token"].tolist())
    for token in token_ids:
        place = next((place for place, one in sampled if one == token), None)
        if place is None:
            return None
        kept.append(place)
    return found[kept]
