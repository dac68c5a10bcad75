"""How do log-probabilities of sampled tokens leave vLLM without Python objects for each of them?

The model executor hands them over once per step, as one array for all requests. vLLM would cut it
into a slice per request, and each slice into further objects: some 10 us a token, on the thread
that schedules. Here the array is taken on its way from the executor to the scheduler, and what
belongs to a response is put together when that is finished.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from chatlearn_vllm.engines.vllm_compat import split_request_id


@dataclass
class _Response:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


class SampledLogprobs:
    """What came so far, of requests that asked for `logprobs=0`."""

    def __init__(self) -> None:
        self._num_responses: dict[str, int] = {}
        self._responses: dict[tuple[str, int], _Response] = {}
        self._of_vllm: dict[str, _Response | None] = {}
        """By vLLM's own request ids; None for requests that are gone."""

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
            return _Taken(output, self)
        if getattr(output, "logprobs", None) is None:
            return output
        lists, output.logprobs = output.logprobs, None
        rows = zip(
            output.req_ids,
            output.sampled_token_ids,
            lists.logprobs[:, 0].tolist(),
            lists.sampled_token_ranks.tolist(),
            strict=True,
        )
        for vllm_id, token_ids, logprob, rank in rows:
            response = self._of_vllm.get(vllm_id)
            if response is None:
                response = self._first_seen(vllm_id)
            if token_ids and response is not None:
                (token,) = token_ids
                response.token_ids.append(token)
                response.logprobs.append(logprob)
                response.ranks.append(rank)
        return output

    def fill(self, output: Any) -> None:
        """Write the log-probabilities into a finished `vllm.RequestOutput`.

        Raises:
            RuntimeError: a token's never came.
        """
        from vllm.logprobs import FlatLogprobs

        for completion in output.outputs:
            kept = self._take(output.request_id, completion.index, list(completion.token_ids))
            count = len(kept.token_ids)
            completion.cumulative_logprob = sum(kept.logprobs)
            completion.logprobs = FlatLogprobs(
                start_indices=list(range(count)),
                end_indices=list(range(1, count + 1)),
                token_ids=kept.token_ids,
                logprobs=kept.logprobs,
                ranks=kept.ranks,
                decoded_tokens=[None] * count,
            )

    def take(self, request_id: str, token_ids: list[int]) -> list[float]:
        """The log-probabilities of the tokens of a request with one response, which is over.

        Raises:
            RuntimeError: a token's never came.
        """
        return self._take(request_id, 0, token_ids).logprobs

    def _take(self, request_id: str, index: int, token_ids: list[int]) -> _Response:
        found = self._responses.pop((request_id, index), _Response())
        kept = _matching(found, token_ids)
        if kept is None:
            raise RuntimeError(
                f"request {request_id}: vLLM answers with {len(token_ids)} tokens, of which the "
                f"executor has handed over {len(found.token_ids)}"
            )
        return kept

    def _first_seen(self, vllm_id: str) -> _Response | None:
        if vllm_id in self._of_vllm:
            return None
        name = split_request_id(vllm_id, self._num_responses)
        response = _Response() if name else None
        if name:  # a request of this id that was dropped before may still have had a token coming
            self._responses[name] = response
        self._of_vllm[vllm_id] = response
        return response


def _matching(found: _Response, token_ids: list[int]) -> _Response | None:
    """Of what was sampled, that which the answer is made of; None if something is missing.

    vLLM drops tokens that were sampled after a response had ended, or before it was computed anew.
    """
    count = len(token_ids)
    if found.token_ids[:count] == token_ids:
        return _Response(token_ids, found.logprobs[:count], found.ranks[:count])
    kept = _Response()
    sampled = iter(zip(found.token_ids, found.logprobs, found.ranks, strict=True))
    for token in token_ids:
        entry = next((one for one in sampled if one[0] == token), None)
        if entry is None:
            return None
        kept.token_ids.append(entry[0])
        kept.logprobs.append(entry[1])
        kept.ranks.append(entry[2])
    return kept


class _Taken(Future):
    """A step's output, without what was taken from it; vLLM only asks for the result."""

    def __init__(self, inner: Future, logprobs: SampledLogprobs) -> None:
        super().__init__()
        self._inner, self._logprobs = inner, logprobs

    def done(self) -> bool:
        return self._inner.done()

    def result(self, timeout: float | None = None) -> Any:
        if not super().done():
            self.set_result(self._logprobs.take_from(self._inner.result(timeout)))
        return super().result()
