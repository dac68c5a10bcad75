"""One rank of a vLLM engine in this process: build it, step it, put it to sleep, show its weights.

vLLM is held, never inherited from, and reached through its public seams only. With several ranks
per replica each rank runs its own engine and, given the same requests, the identical schedule
(as under vLLM's `external_launcher`), so a rank is driven locally.
"""

import gc
import os
import uuid
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chatlearn_vllm.engines import vllm_compat
from chatlearn_vllm.engines.beam_search import BeamSearch, BeamSearchKeys
from chatlearn_vllm.engines.draft_model import DraftModel
from chatlearn_vllm.engines.generation_engine import EngineStateError, GenerationEngine, Weights
from chatlearn_vllm.engines.response_text import (
    TextKeys,
    decoder_of,
    response_texts,
    without_text,
)
from chatlearn_vllm.engines.sampled_logprobs import SampledLogprobs
from chatlearn_vllm.engines.speculation import Speculation, bind_step_counter
from chatlearn_vllm.engines.vllm_executor import Step, StepOwner, bind_executor
from chatlearn_vllm.engines.vllm_partial import PartialRequest
from chatlearn_vllm.engines.whole_tensors import checked_tensors
from chatlearn_vllm.layouts import (
    ModelShape,
    ParamLayout,
    RolloutParallel,
    VLLMShards,
    check_live_parameters,
)


class VLLMEngine(GenerationEngine):
    """A vLLM V1 engine whose scheduler steps pass through an owner, and whose state is explicit."""

    def __init__(
        self,
        engine_arguments: dict[str, Any],
        shape: ModelShape,
        owner: StepOwner,
        *,
        seed_per_response: bool = True,
        older_model_runner: bool = False,
    ) -> None:
        """Build the engine; collective over the replica's ranks.

        Args:
            engine_arguments: for `vllm.EngineArgs`, under vLLM's names.
            shape: sizes of the model, for `shards`.
            owner: its `on_step` is called once per scheduled batch.
            seed_per_response: whether requests are drawn with their own seeds. Else that of the
                first request that comes to an idle engine seeds all until it is idle again.
            older_model_runner: whether requests need that of vLLM's two.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: vLLM refuses the arguments.
        """
        if not dist.is_initialized():
            raise RuntimeError("initialise torch.distributed before building the engine")
        pipeline = engine_arguments.get("pipeline_parallel_size", 1)
        draft_method = (engine_arguments.get("speculative_config") or {}).get("method")
        vllm_compat.set_environment(
            draft_method=draft_method, older_model_runner=older_model_runner
        )
        from vllm import LLMEngine

        self._owner = owner
        self._distributed_id = _shared_id()
        self._error_in_step: Exception | None = None
        executor = bind_executor(self, self._distributed_id)
        arguments = dict(engine_arguments)
        if pipeline > 1:
            arguments["distributed_executor_backend"] = executor
        if draft_method:
            self.speculation = Speculation(self._switch_drafting)
            vllm_compat.repair_cpu_drafts()
        with vllm_compat.undisturbed_process(), vllm_compat.unpacked_cpu_weights():
            self._engine = LLMEngine(
                vllm_compat.engine_config(arguments),
                executor_class=executor,
                log_stats=not arguments.get("disable_log_stats", False),
                stat_loggers=[bind_step_counter(self.speculation)] if self.speculation else None,
                multiprocess_mode=False,
            )
            vllm_compat.compile_grammars_at_once(self._engine)
            vllm_compat.keep_process_groups(self._engine)
            if vllm_compat.needs_dummy_batch(pipeline_parallel_size=pipeline):
                self._engine.collective_rpc("execute_dummy_batch")
            self._rng = vllm_compat.RandomState.capture()
        if self.speculation is not None:
            self.speculation.goes_on_because = vllm_compat.why_drafting_goes_on(self._engine)
        self._shape = shape
        self._order: list[str] = []
        self._partial: dict[str, PartialRequest] = {}
        self._searches: dict[str, BeamSearch] = {}
        self._text_keys: dict[str, TextKeys | None] = {}
        self._sampled: SampledLogprobs | None = None
        """What takes log-probabilities out of each step at once; None where vLLM does."""
        self.seed_per_response = seed_per_response
        super().__init__(has_weights=arguments.get("load_format") != "dummy")
        self.draft = self._find_draft()

    def _find_draft(self) -> DraftModel | None:
        model = vllm_compat.draft_model(self._engine) if self.speculation else None
        if model is None:
            return None
        draft = DraftModel(self._engine, model, self.model, self.forget_prefixes)
        if self._engine.vllm_config.speculative_config.method == "draft_model":
            if vllm_compat.draft_is_built_random(self._engine):
                draft.expect_sync()
            elif self.state.weights is Weights.DUMMY:
                draft.load(None)
        return draft

    @property
    def model(self) -> torch.nn.Module:
        """This rank's live model."""
        return self._engine.apply_model(_itself)[0]

    @property
    def hf_config(self) -> Any:
        """The Hugging Face config that vLLM built the model from."""
        return self._engine.model_config.hf_config

    def add_request(
        self, request_id: str, prompt: str | None, token_ids: list[int], sampling: dict[str, Any]
    ) -> None:
        """Queue a prompt.

        Args:
            request_id: unique among the queued requests.
            prompt: its text, handed back as `RequestOutput.prompt`.
            token_ids: what the model sees.
            sampling: for `vllm.SamplingParams`; with `beam_width`, see `BeamSearchKeys`.

        Raises:
            ValueError: vLLM refuses the request (too long, empty, a token outside the vocabulary).
        """
        if "beam_width" in sampling:
            self._add_search(request_id, prompt, list(token_ids), sampling)
        else:
            fast, self._text_keys[request_id] = without_text(sampling)
            self._take_logprobs(in_bulk=sampling.get("logprobs") == 0)
            if self._sampled is not None:
                self._sampled.expect(request_id, sampling.get("n", 1))
            self._add(request_id, prompt, list(token_ids), fast, "FINAL_ONLY")
        self._order.append(request_id)

    def _take_logprobs(self, in_bulk: bool) -> None:
        """Say how log-probabilities leave vLLM, before a request is added.

        Raises:
            ValueError: requests of the other kind are running.
        """
        if self._engine.has_unfinished_requests():
            if self._sampled is not None and not in_bulk:
                raise ValueError(
                    "beam searches and requests with logprobs > 0 cannot join others; let these "
                    "finish first"
                )
        else:
            self._sampled = SampledLogprobs() if in_bulk else None

    def take_sampled(self, output: Any) -> Any:
        """Pass a step's output on to vLLM's scheduler; called by the executor."""
        return output if self._sampled is None else self._sampled.take_from(output)

    def _add_search(
        self, request_id: str, prompt: str | None, token_ids: list[int], sampling: dict[str, Any]
    ) -> None:
        room = self._engine.model_config.max_model_len - len(token_ids)
        limited = sampling | {"max_tokens": min(sampling["max_tokens"], room)}
        try:
            keys = BeamSearchKeys.of(limited)
        except ValueError as error:
            raise ValueError(f"request {request_id}: {error}") from error
        self._take_logprobs(in_bulk=False)
        search = BeamSearch(request_id, prompt, token_ids, keys, self._eos_token_ids)
        for name, ids, own in search.requests():
            self._add(name, None, ids, own, "FINAL_ONLY")
        self._searches[request_id] = search

    @cached_property
    def _eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end-of-sequence token, then those of generation_config.json."""
        config = self._engine.model_config.try_get_generation_config()
        of_model = config.get("eos_token_id")
        ids = (self._engine.get_tokenizer().eos_token_id, *_listed(of_model))
        return tuple(dict.fromkeys(token for token in ids if token is not None))

    def _note_beam(self, search: BeamSearch, output: Any) -> dict[str, Any]:
        """Take a beam's next tokens and go on; the answer by its id, if that was the last."""
        (made,) = output.outputs
        if not search.note(output.request_id, made.logprobs[0]):
            return {}
        if not search.is_finished:
            for name, ids, sampling in search.requests():
                self._add(name, None, ids, sampling, "FINAL_ONLY")
            return {}
        del self._searches[search.request_id]
        tokenizer = self._engine.get_tokenizer()
        return {
            search.request_id: search.output(
                lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip)
            )
        }

    def add_partial_request(self, request: PartialRequest) -> None:
        """Queue a prompt whose responses may have been begun, and can be cut off by `cut`.

        Raises:
            ValueError: vLLM refuses it.
        """
        self._take_logprobs(request.takes_sampled_logprobs)
        for request_id, token_ids, sampling in request.requests():
            self._add(request_id, None, token_ids, without_text(sampling)[0], "DELTA")
            if self._sampled is not None:
                self._sampled.expect(request_id, 1)
        self._order.append(request.request_id)
        self._partial[request.request_id] = request

    def _add(
        self,
        request_id: str,
        prompt: str | None,
        token_ids: list[int],
        sampling: dict[str, Any],
        output_kind: str,
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if not self.seed_per_response and "seed" in sampling:
            if not self._engine.has_unfinished_requests():
                self._rng = vllm_compat.RandomState.seeded(sampling["seed"])
            sampling = {name: value for name, value in sampling.items() if name != "seed"}
        try:
            params = SamplingParams(
                **_with_vllms_maps(sampling), output_kind=RequestOutputKind[output_kind]
            )
            # One arrival time for all: ranks of a replica must not order requests by their clocks.
            self._engine.add_request(
                request_id,
                {"prompt_token_ids": token_ids, "prompt": prompt},
                params,
                arrival_time=0.0,
            )
        except vllm_compat.validation_errors() as error:
            raise ValueError(f"request {request_id}: {error}") from error

    @property
    def requests(self) -> tuple[str, ...]:
        """Ids of the queued and running requests, in the order in which they were added."""
        return tuple(self._order)

    def run(
        self,
        min_finished: int | None = None,
        max_steps: int | None = None,
    ) -> list[Any]:
        """See GenerationEngine; a step is one of vLLM's scheduler."""
        self.require_ready()
        wanted = len(self._order) if min_finished is None else min(min_finished, len(self._order))
        outer = vllm_compat.RandomState.capture()
        self._rng.restore()
        thresholds = gc.get_threshold()
        gc.set_threshold(*thresholds[:2], 2**30)  # a full collection takes longer than many steps
        steps = 0
        try:
            outputs = self._finished_partial(list(self._partial))
            # step() may return nothing while batches are in flight.
            while len(outputs) < wanted and steps != max_steps:
                if not self._engine.has_unfinished_requests():
                    lost = [name for name in self._order if name not in outputs]
                    raise RuntimeError(f"vLLM has dropped requests without an answer: {lost}")
                with self.speculation.step() if self.speculation else nullcontext():
                    stepped = self._engine.step()
                steps += 1
                if self._error_in_step is not None:
                    raise self._error_in_step
                for output in stepped:
                    name = output.request_id.rpartition("#")[0]
                    if name in self._partial:
                        self._partial[name].note(output, self.state.version)
                        if output.finished:
                            outputs |= self._finished_partial([name])
                    elif name in self._searches:
                        outputs |= self._note_beam(self._searches[name], output)
                    elif output.finished:
                        self._write_texts(output)
                        if self._sampled is not None:
                            self._sampled.fill(output)
                        outputs[output.request_id] = output
        except BaseException:
            self.abort()
            raise
        finally:
            self._error_in_step = None
            gc.set_threshold(*thresholds)
            self._rng = vllm_compat.RandomState.capture()
            outer.restore()
        finished = [outputs[request_id] for request_id in self._order if request_id in outputs]
        self._order = [request_id for request_id in self._order if request_id not in outputs]
        return finished

    def _write_texts(self, output: Any) -> None:
        """Fill in what vLLM was not asked for."""
        keys = self._text_keys.pop(output.request_id)
        tokenizer = self._engine.get_tokenizer()
        if keys is None or tokenizer is None:
            return
        responses = []
        for completion in output.outputs:
            ids = list(completion.token_ids)
            is_cut = completion.finish_reason == "stop" and not keys.include_stop_str_in_output
            responses.append(ids[:-1] if is_cut else ids)
        decode = decoder_of(tokenizer, skip_special_tokens=keys.skip_special_tokens)
        texts = response_texts(decode, output.prompt_token_ids, responses)
        for completion, text in zip(output.outputs, texts, strict=True):
            completion.text = text

    def _finished_partial(self, names: list[str]) -> dict[str, Any]:
        """Those of some partial requests that are finished, by their ids; each once."""
        outputs = {}
        for name in names:
            if self._partial[name].is_finished:
                request = self._closed(self._partial.pop(name))
                skip = request.skip_special_tokens
                decode = decoder_of(self._engine.get_tokenizer(), skip_special_tokens=skip)
                outputs[name] = request.output(decode)
        return outputs

    def _closed(self, request: PartialRequest) -> PartialRequest:
        """A partial request that gets no more tokens, with all log-probabilities."""
        if self._sampled is not None:
            request.fill_logprobs(self._sampled)
        return request

    def cut(self) -> list[PartialRequest]:
        """Drop all queued and running requests; the partial ones as far as they have come."""
        cut = [self._closed(request) for request in self._partial.values()]
        self.abort()
        # What was in flight comes out, and the workers hear of the end.
        for _ in range(self._engine.vllm_config.parallel_config.pipeline_parallel_size + 2):
            self._engine.step()
        return cut

    def on_step(self, step: Step) -> Any:
        """Pass a scheduled batch to the owner; called by the executor.

        Whatever the owner does, the batch is run: it also tells vLLM's workers which requests have
        ended, and they would keep the places of those. An error of the owner is raised when the
        step is over.
        """
        try:
            self._owner.on_step(step)
        except Exception as error:  # the user's hook may raise anything; raised again by run()
            if step.error is not None:
                raise
            if not step.executed:
                step.execute()
            self._error_in_step = error
        return step.handle

    def abort(self) -> None:
        """Drop all queued and running requests."""
        several = [*self._partial.values(), *self._searches.values()]
        names = {request.request_id for request in several}
        whole = [request_id for request_id in self._order if request_id not in names]
        parts = [part for request in several for part in request.open_ids]
        self._engine.abort_request(whole + parts)
        self._order, self._partial, self._searches = [], {}, {}
        self._text_keys = {}

    def load_draft(self, directory: str | None) -> None:
        """Read the weights of the model that drafts.

        Args:
            directory: of a model of the same shape; None: that of `speculative_config`.

        Raises:
            EngineStateError: the weights are asleep.
            ValueError: the engine has no such model, or the directory lacks a layer that is the
                draft's own.
        """
        if self.draft is None:
            raise ValueError("load_draft(): speculative_config names no model that drafts")
        self.draft.load(directory)

    def require_ready(self) -> None:
        """See GenerationEngine; what drafts has to be READY, too."""
        super().require_ready()
        if self.draft is not None:
            try:
                self.draft.require_ready()
            except EngineStateError:
                self.abort()
                raise

    def _switch_drafting(self, drafts: bool) -> None:
        vllm_compat.set_drafting(self._engine, drafts)

    def _sleep(self, level: int) -> None:
        if self.draft is not None:
            self.draft.sleep(level)
        self._engine.reset_prefix_cache()
        self._engine.sleep(level)

    def _wake_weights(self) -> None:
        self._engine.wake_up(["weights"])
        if self.draft is not None:
            self.draft.wake()

    def _wake_kv_cache(self) -> None:
        self._engine.wake_up(["kv_cache"])

    def _forget_prefixes(self) -> None:
        self._engine.reset_prefix_cache()

    def _note_version(self, version: int) -> None:
        vllm_compat.set_weight_version(self._engine, version)

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See GenerationEngine; the tensors pass through vLLM's own loader.

        Slower than writing into live parameters, and right for every kind of engine: vLLM cuts,
        quantises and rearranges the tensors as it did when it was built. Tensors of a layer should
        follow one another: vLLM holds begun layers twice.
        """
        self.begin_weight_update()
        reload = partial(vllm_compat.reload_weights, self._engine, self.model)
        try:
            reload(checked_tensors(tensors, self._shape))
        except BaseException:
            reload(iter(()))  # has vLLM forget the layers of which only a part came
            raise

    def direct_copy_problem(self) -> str | None:
        """Why new weights cannot be written into the live parameters; None if they can.

        They cannot where vLLM quantised or rearranged them after loading, moves experts between
        ranks, or builds a model that `layouts` does not describe.
        """
        if self._engine.vllm_config.parallel_config.enable_eplb:
            return "enable_eplb moves experts between ranks"
        for name, module in self.model.named_modules():
            if problem := vllm_compat.rewritten_weights(name, module):
                return problem
        try:
            self.check_layouts(self.shards(1).rank_layouts(dist.get_rank()))
        except ValueError as error:
            return str(error)
        return None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's live parameters by vLLM's names; tied parameters once."""
        return {name: getattr(owner, own) for name, (owner, own) in self._owners.items()}

    @cached_property
    def _owners(self) -> dict[str, tuple[torch.nn.Module, str]]:
        """Which module holds each parameter under which name.

        Kept, because walking all modules takes longer than a small weight sync. The parameters are
        not: vLLM puts new ones in their places when it reloads.
        """
        owners = {}
        for name, _ in self.model.named_parameters():
            module, _, own = name.rpartition(".")
            owners[name] = (self.model.get_submodule(module), own)
        return owners

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return self._engine.model_config.dtype

    @property
    def device(self) -> torch.device:
        """Where this rank's parameters are."""
        return next(iter(self.parameters().values())).device

    def shards(self, num_replicas: int) -> VLLMShards:
        """Where the model lies on the ranks of so many replicas like this one."""
        config = self._engine.vllm_config.parallel_config
        parallel = RolloutParallel(
            tensor=config.tensor_parallel_size,
            pipeline=config.pipeline_parallel_size,
            expert=config.enable_expert_parallel,
            replicas=num_replicas,
        )
        return VLLMShards(self._shape, parallel)

    def check_layouts(self, layouts: list[ParamLayout]) -> None:
        """Compare what this rank should hold with its live parameters.

        Raises:
            ValueError: they are not those that config.json describes (quantised, another
                architecture); lists what differs.
        """
        live = {name: tuple(param.shape) for name, param in self.model.named_parameters()}
        check_live_parameters(layouts, live, "vLLM")

    def metrics(self) -> dict[str, float]:
        """vLLM's own counters and gauges by name, summed over labels; none if it counts nothing."""
        values: dict[str, float] = {}
        if not self._engine.log_stats:
            return values
        for metric in self._engine.get_metrics():
            value = getattr(metric, "value", None)  # counters and gauges; histograms have none
            if value is not None:
                values[metric.name] = values.get(metric.name, 0.0) + value
        return values

    def close(self) -> None:
        """Remove the shared memory that vLLM's CPU communicator leaves behind, free what froze."""
        gc.unfreeze()
        for leftover in Path("/dev/shm").glob(f"*{self._distributed_id}*"):
            leftover.unlink(missing_ok=True)


def _listed(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or ())


def _with_vllms_maps(sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling keys with maps, as yaml has them, in the classes that vLLM wants."""
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    classes = {
        "structured_outputs": StructuredOutputsParams,
        "repetition_detection": RepetitionDetectionParams,
    }
    made = {
        name: make(**sampling[name])
        for name, make in classes.items()
        if isinstance(sampling.get(name), dict)
    }
    return sampling | made


def _itself(model: torch.nn.Module) -> torch.nn.Module:
    return model


def _shared_id() -> str:
    """A text that all ranks of the replica share and no other replica or job uses.

    It holds the job's id, by which the runtime finds what a killed rank left behind.
    """
    box = [f"{os.environ.get('CHATLEARN_VLLM_JOB_ID', '')}-{uuid.uuid4().hex[:12]}"]
    dist.broadcast_object_list(box, src=0)
    return box[0]
