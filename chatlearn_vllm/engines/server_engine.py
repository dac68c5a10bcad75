"""How does a replica generate with a vLLM server in place of an engine of its own?

Requests go over the server's OpenAI API as token ids, and come back as token ids with the
log-probability of each. New weights go through a stream to the server's workers
(`weight_stream.py`), which pass them through vLLM's own loader (`vllm_server_worker.py`).
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch

from chatlearn_vllm.config.server_checks import SAMPLING_KEYS
from chatlearn_vllm.engines.generation_engine import (
    EngineState,
    EngineStateError,
    Weights,
)
from chatlearn_vllm.engines.request_output import CompletionOutput, Logprob, RequestOutput
from chatlearn_vllm.engines.scheduled_batch import NewRequest, ScheduledBatch
from chatlearn_vllm.engines.server_client import ServerClient, ServerError
from chatlearn_vllm.engines.server_process import ServerProcess
from chatlearn_vllm.engines.server_rank import ServerRank
from chatlearn_vllm.engines.server_start import ServerFacts
from chatlearn_vllm.engines.vllm_executor import Step, StepOwner
from chatlearn_vllm.engines.weight_stream import StreamError, StreamSender
from chatlearn_vllm.engines.whole_tensors import checked_tensors
from chatlearn_vllm.layouts import ModelShape, ShardedModel

CACHE_RESET_ATTEMPTS = 10


@dataclass
class _Request:
    """A queued or running request."""

    prompt: str | None
    token_ids: list[int]
    body: dict[str, Any]
    answer: concurrent.futures.Future[Any] | None = None
    """None until it is sent."""


class ServerEngine(ServerRank):
    """The first rank of a replica of a policy that a vLLM server answers for.

    There is no scheduler step here: the owner's `on_step` is called once for all requests that are
    sent together.
    """

    def __init__(
        self,
        client: ServerClient,
        facts: ServerFacts,
        shape: ModelShape,
        owner: StepOwner,
        *,
        dtype: torch.dtype,
        timeout_s: float,
        process: ServerProcess | None = None,
        ranks_per_replica: int = 1,
        has_weights: bool = True,
        seed_per_response: bool = True,
    ) -> None:
        """Take a server that was found fit; see `server_start.py`.

        Args:
            client: calls the server.
            facts: what it said at the start.
            shape: sizes of the model.
            owner: its `on_step` is called once per batch of requests.
            dtype: in which weights are sent.
            timeout_s: longest wait while weights are sent.
            process: the server, if it was started for this engine; ended by `close`.
            ranks_per_replica: see ServerRank.
            has_weights: whether the server has weights of its own, not random ones.
            seed_per_response: whether requests are sent with their seeds. Else the server's own
                random state draws, and what it drew before matters.
        """
        super().__init__(
            shape, dtype=dtype, ranks_per_replica=ranks_per_replica, has_weights=has_weights
        )
        self._client = client
        self._facts = facts
        self._owner = owner
        self._timeout_s = timeout_s
        self._process = process
        self._seed_per_response = seed_per_response
        self._requests: dict[str, _Request] = {}
        self._is_paused = False
        self._boot_ids = facts.boot_ids
        """Which start of its workers has the weights."""
        self._weights_ids: tuple[str, ...] = ()
        """Which weights these are, by worker; none before the first sync."""

    # ---- requests ---------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt: str | None, token_ids: list[int], sampling: dict[str, Any]
    ) -> None:
        """See GenerationEngine; the request is sent by `run`."""
        unknown = sorted(sampling.keys() - SAMPLING_KEYS)
        if unknown:
            raise ValueError(
                f"request {request_id}: a vLLM server's completions API does not take "
                f"{', '.join(unknown)}; leave it out, or set inference_engine: vllm"
            )
        if not token_ids:
            raise ValueError(f"request {request_id}: the prompt is empty")
        strange = [token for token in token_ids if not 0 <= token < self._shape.vocab_size]
        if strange:
            raise ValueError(
                f"request {request_id}: token {strange[0]} is outside the vocabulary of "
                f"{self._shape.vocab_size} tokens"
            )
        num_tokens = len(token_ids) + sampling["max_tokens"]
        if num_tokens > self._facts.max_model_len:
            raise ValueError(
                f"request {request_id}: {len(token_ids)} tokens of the prompt and max_tokens="
                f"{sampling['max_tokens']} exceed the server's max_model_len="
                f"{self._facts.max_model_len}"
            )
        body = {name: value for name, value in sampling.items() if value is not None}
        if not self._seed_per_response:
            body.pop("seed", None)
        body |= {
            "model": self._facts.model,
            "prompt": list(token_ids),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # else the server makes text of each
        }
        self._requests[request_id] = _Request(prompt, list(token_ids), body)

    @property
    def requests(self) -> tuple[str, ...]:
        """Ids of the queued and running requests, in the order in which they were added."""
        return tuple(self._requests)

    def run(
        self,
        min_finished: int | None = None,
        max_steps: int | None = None,
    ) -> list[Any]:
        """Send what is queued and wait until requests are answered.

        Args:
            min_finished: return as soon as so many are; the server goes on with the others
                meanwhile. None: all of them.
            max_steps: of no effect; the steps are the server's.

        Returns:
            One `RequestOutput` per answered request, in the order in which they were added.

        Raises:
            EngineStateError: the engine is not READY, or the server has other weights than it
                was given.
            ServerError: the server failed, and trying again did not help.
            ValueError: the server refuses a request.
        """
        self.require_ready()
        wanted = len(self._requests) if min_finished is None else min_finished
        try:
            self._require_version()
            self._send_queued()
            outputs = self._wait_for(wanted)
            self._require_version()
        except BaseException as error:
            self.abort()
            if isinstance(error, ServerError) and self._process and not self._process.is_running:
                raise ServerError(f"{error}; the server has ended{self._end_of_log()}") from error
            raise
        for request_id in outputs:
            del self._requests[request_id]
        return list(outputs.values())

    def _send_queued(self) -> None:
        """Have the owner send what `add_request` has queued."""
        queued = {name: one for name, one in self._requests.items() if one.answer is None}
        if not queued:
            return

        def send() -> None:
            for request in queued.values():
                request.answer = self._client.start_completion(request.body)

        batch = ScheduledBatch([NewRequest(name, one.token_ids) for name, one in queued.items()])
        self._owner.on_step(Step(batch, send))

    def _wait_for(self, num_wanted: int) -> dict[str, RequestOutput]:
        """The answered requests, at least so many, in order."""
        while True:
            running = [one.answer for one in self._requests.values() if not one.answer.done()]
            for request in self._requests.values():
                if request.answer.done():
                    request.answer.result()  # raises what went wrong
            if not running or len(self._requests) - len(running) >= num_wanted:
                break
            concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        return {
            name: _output(name, request, request.answer.result())
            for name, request in self._requests.items()
            if request.answer.done()
        }

    def abort(self) -> None:
        """Drop all queued and running requests; the server ends those that it works on."""
        for request in self._requests.values():
            if request.answer is not None:
                request.answer.cancel()
        self._requests = {}

    def _require_version(self) -> None:
        """Check that the server has the weights that it was given.

        Raises:
            EngineStateError: it was started anew, or somebody else gave it weights.
        """
        if self._facts.boot_ids is None or self.state.version == 0:
            return
        workers = self._workers("chatlearn_describe")
        boot_ids = tuple(worker["boot_id"] for worker in workers)
        versions = {worker["weight_version"] for worker in workers}
        weights_ids = tuple(worker["weights_id"] for worker in workers)
        if boot_ids == self._boot_ids and weights_ids == self._weights_ids:
            return
        self.state = EngineState(Weights.STALE, self.state.version, self.state.kv_cache_awake)
        happened = "was started anew" if boot_ids != self._boot_ids else "was given others"
        raise EngineStateError(
            f"{self._client.url} no longer has the weights of version {self.state.version}: it "
            f"{happened} (now of version {sorted(versions, key=str)}); a weight sync must follow. "
            "A server can belong to one job only"
        )

    # ---- memory -----------------------------------------------------------------------------

    def _sleep(self, level: int) -> None:
        if self._facts.can_sleep:
            self._client.post(f"/sleep?level={level}")

    def _wake_weights(self) -> None:
        if self._facts.can_sleep:
            self._client.post("/wake_up?tags=weights")

    def _wake_kv_cache(self) -> None:
        if self._facts.can_sleep:
            self._client.post("/wake_up?tags=kv_cache")

    # ---- weights ----------------------------------------------------------------------------

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See GenerationEngine.

        Requests that other clients have sent are answered first; those that come meanwhile wait
        until `finish_weight_update`.

        Raises:
            EngineStateError: the weights are asleep, or requests are under way here.
            ValueError: a tensor is missing, unknown or of another shape; or the server does not
                take weights.
            ServerError: the server failed; it may be tried again.
        """
        self.require_weight_updates()
        if self._requests:
            raise EngineStateError(
                f"{len(self._requests)} requests are under way; take their answers with run(), or "
                "abort(), before the weights change"
            )
        self.begin_weight_update()
        # A sleeping server schedules nothing, and resuming would have it begin without KV cache.
        is_asleep = self._facts.can_sleep and not self.state.kv_cache_awake
        if not self._is_paused and not is_asleep:
            self._client.post("/pause?mode=wait", is_repeatable=True)
            self._is_paused = True
        parts = urlsplit(self._client.url)
        with StreamSender(parts.hostname, parts.port or 80) as sender:
            kwargs = {
                "address": sender.address, "token": sender.token, "timeout_s": self._timeout_s,
            }  # fmt: skip
            loading = self._client.start_post(
                "/collective_rpc", {"method": "chatlearn_load", "kwargs": kwargs}
            )
            failed: StreamError | None = None
            try:
                sender.send(
                    checked_tensors(tensors, self._shape),
                    check=lambda: _raise_if_failed(loading),
                    timeout_s=self._timeout_s,
                )
            except StreamError as error:
                failed = error  # the server knows better why
            except BaseException:
                _result_or_none(loading)  # it has noticed that the stream ended early
                raise
            answers = _worker_answers(loading.result())
        problems = [answer["error"] for answer in answers if "error" in answer]
        if problems or failed:
            raise ServerError(
                f"{self._client.url}: the server did not take the weights: "
                + "; ".join(dict.fromkeys(problems) or [str(failed)])
                + self._end_of_log()
            ) from failed
        expected = sum(1 for _ in self._shape.tensor_names())
        if {answer["num_tensors"] for answer in answers} != {expected}:
            raise ServerError(
                f"{self._client.url}: the workers took {answers} instead of {expected} tensors"
            )

    def _forget_prefixes(self) -> None:
        if self._facts.boot_ids is None:
            return
        for _ in range(CACHE_RESET_ATTEMPTS):
            answer = self._client.post("/reset_prefix_cache", is_repeatable=True)
            if answer is None or answer.get("success", True):  # 0.25 says nothing
                return
            time.sleep(0.1)
        raise ServerError(
            f"{self._client.url}: the server does not empty its prefix cache; requests of other "
            "clients hold it"
        )

    def _note_version(self, version: int) -> None:
        if self._facts.boot_ids is None:
            return
        workers = self._workers("chatlearn_set_version", version=version)
        self._boot_ids = tuple(worker["boot_id"] for worker in workers)
        self._weights_ids = tuple(worker["weights_id"] for worker in workers)
        if self._is_paused:
            self._client.post("/resume", is_repeatable=True)
            self._is_paused = False

    def require_weight_updates(self) -> None:
        """Check that the server takes weights.

        Raises:
            ValueError: it does not.
        """
        if self._facts.boot_ids is None:
            raise ValueError(
                f"vllm_server={self._client.url}: this server does not take weights from a job; "
                "start it with `chatlearn-vllm serve DIR --weight-updates`, or let the job start "
                "one with vllm_server: start"
            )

    def shards(self, num_replicas: int) -> ShardedModel:
        """See ServerRank.

        Raises:
            ValueError: the server does not take weights.
        """
        self.require_weight_updates()
        return super().shards(num_replicas)

    # ---- the rest ---------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """The server's counters and gauges by vLLM's names, summed over labels."""
        text = self._client.get_text("/metrics")
        return dict(_totals(text.splitlines()))

    def close(self) -> None:
        """Drop requests, and end the server if it was started for this engine."""
        self.abort()
        self._client.close()
        if self._process is not None:
            self._process.stop()

    def _workers(self, method: str, **kwargs: Any) -> list[dict[str, Any]]:
        """Run a method of `vllm_server_worker.WeightUpdates` on all workers; their answers.

        Raises:
            ServerError: one of them says an error.
        """
        answers = _worker_answers(
            self._client.post("/collective_rpc", {"method": method, "kwargs": kwargs})
        )
        if errors := dict.fromkeys(answer["error"] for answer in answers if "error" in answer):
            raise ServerError(f"{self._client.url}: {'; '.join(errors)}")
        return answers

    def _end_of_log(self) -> str:
        if self._process is None:
            return ""
        return f"\nfrom {self._process.log}:\n{self._process.last_lines()}"


def _worker_answers(answer: Any) -> list[dict[str, Any]]:
    return answer["results"]


def _raise_if_failed(loading: concurrent.futures.Future[Any]) -> None:
    """Raise what ended the call; a call that has an answer already has an error in it."""
    if loading.done():
        answers = _worker_answers(loading.result())
        raise StreamError("; ".join(str(answer.get("error", answer)) for answer in answers))


def _result_or_none(future: concurrent.futures.Future[Any]) -> Any:
    try:
        return future.result()
    except (ServerError, ValueError):
        return None


def _output(request_id: str, request: _Request, answer: dict[str, Any]) -> RequestOutput:
    """An answer of the completions API as the object that modules read."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != request.body.get("n", 1):
        raise ServerError(
            f"request {request_id}: {len(choices)} responses came for n={request.body.get('n', 1)}"
        )
    prompt_logprobs = choices[0].get("prompt_logprobs")
    return RequestOutput(
        request_id=request_id,
        prompt=request.prompt,
        prompt_token_ids=request.token_ids,
        prompt_logprobs=prompt_logprobs and [_places(place) for place in prompt_logprobs],
        outputs=[_completion(request_id, choice, request.body["max_tokens"]) for choice in choices],
        finished=True,
    )


def _places(place: dict[str, dict[str, Any]] | None) -> dict[int, Logprob] | None:
    if place is None:
        return None
    return {
        int(token): Logprob(entry["logprob"], entry.get("rank"), entry.get("decoded_token"))
        for token, entry in place.items()
    }


def _completion(request_id: str, choice: dict[str, Any], max_tokens: int) -> CompletionOutput:
    token_ids = choice.get("token_ids")
    if token_ids is None:
        raise ServerError(f"request {request_id}: the server sent no token ids; it needs vLLM 0.25")
    if choice["finish_reason"] not in ("stop", "length"):
        raise ServerError(
            f"request {request_id}: the server ended a response with finish_reason="
            f"{choice['finish_reason']!r}; somebody else may have aborted or paused it"
        )
    if choice["finish_reason"] == "length" and len(token_ids) < max_tokens:
        raise ServerError(
            f"request {request_id}: the server ended a response after {len(token_ids)} tokens, "
            f"max_tokens={max_tokens} were asked for; start the server without max_new_tokens in "
            "override_generation_config, or in the file that generation_config names"
        )
    values = (choice.get("logprobs") or {}).get("token_logprobs")
    logprobs = None
    if values is not None:
        pairs = zip(token_ids, values, strict=True)
        logprobs = [{token: Logprob(value)} for token, value in pairs]
    return CompletionOutput(
        index=choice["index"],
        text=choice["text"],
        token_ids=token_ids,
        cumulative_logprob=None if values is None else sum(values),
        logprobs=logprobs,
        finish_reason=choice["finish_reason"],
        stop_reason=choice.get("stop_reason"),
    )


def _totals(lines: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Counters and gauges of a Prometheus page, summed over labels; no histograms."""
    kinds: dict[str, str] = {}
    sums: dict[str, float] = {}
    for line in lines:
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            kinds[name] = kind if name.startswith("vllm:") else ""
        elif line and not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            if kinds.get(name) in ("counter", "gauge") and not name.endswith("_created"):
                sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    for name, value in sums.items():
        yield name.removesuffix("_total"), value
