"""Where does user code stand between vLLM's scheduler and its model executor?

Both of vLLM's step functions call `Executor.execute_model` exactly once per scheduled batch. The
class made here derives from vLLM's executor for `external_launcher` and hands that call to the
module's `forward_step`. vLLM takes an executor class as an argument, so nothing is patched, and
async scheduling, CUDA graphs and pipeline batches work as without it.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from chatlearn_vllm.engines.pipeline_stages import PipelineStages, config_of_stage


class StepOwner(Protocol):
    """Who is asked once per scheduler step."""

    def on_step(self, step: "Step") -> Any:
        """Run the step with `step.execute()`."""


class ExecutorOwner(StepOwner, Protocol):
    """The engine that an executor belongs to."""

    def take_sampled(self, output: Any) -> Any:
        """Look at what a step sampled, or at the future of it; returns what vLLM shall get."""


class Step:
    """One scheduled batch, not yet run."""

    def __init__(self, scheduler_output: Any, execute: Callable[[], Any]) -> None:
        self.scheduler_output = scheduler_output
        self.executed = False
        self.error: BaseException | None = None
        """What vLLM raised: there is no handle then."""
        self.handle: Any = None
        """What vLLM's executor returned: a future, or None."""
        self._execute = execute

    def execute(self) -> Any:
        """Hand the batch to vLLM's model executor; returns its handle.

        Raises:
            RuntimeError: the batch was executed before, or vLLM failed to.
        """
        if self.executed or self.error is not None:
            raise RuntimeError("execute_step() may be called only once per forward_step()")
        try:
            self.handle = self._execute()
        except BaseException as error:
            self.error = error
            raise
        self.executed = True
        return self.handle

    def check_done(self, returned: Any, owner: str) -> None:
        """Check that the user's hook executed the batch and passed its handle on.

        Raises:
            RuntimeError: it did not.
            BaseException: what vLLM raised, if the hook kept it to itself.
        """
        if self.error is not None:
            raise self.error
        if not self.executed:
            raise RuntimeError(
                f"{owner} did not call self.execute_step(data), which runs the scheduled batch"
            )
        if returned is not self.handle:
            raise RuntimeError(
                f"{owner} must return what self.execute_step(data) returned, "
                f"it returned {type(returned).__name__}"
            )


@dataclass(frozen=True)
class SequenceGroupMetadata:
    """One request of a scheduled batch, in the words of ChatLearn's data."""

    request_id: str
    """vLLM's internal id: the request's id and, unless disabled, a random suffix."""
    is_prompt: bool
    """Whether the step still works on the prompt."""
    token_chunk_size: int
    """Tokens of this request in this step."""
    num_computed_tokens: int
    """Tokens already in the KV cache before this step."""


class SequenceGroupMetadataList(Sequence):
    """The requests of a step; built when first read, so that not reading it costs nothing."""

    def __init__(self, scheduler_output: Any) -> None:
        self._scheduler_output = scheduler_output
        self._items: list[SequenceGroupMetadata] | None = None

    def _load(self) -> list[SequenceGroupMetadata]:
        if self._items is None:
            self._items = list(_read(self._scheduler_output))
        return self._items

    def __getitem__(self, index: Any) -> Any:
        return self._load()[index]

    def __len__(self) -> int:
        return len(self._scheduler_output.num_scheduled_tokens)


def _read(scheduler_output: Any) -> Iterator[SequenceGroupMetadata]:
    chunk = scheduler_output.num_scheduled_tokens
    for new in scheduler_output.scheduled_new_reqs:
        # With vLLM's newer model runner also one that was preempted and begins again.
        again = new.prefill_token_ids is not None
        is_prompt = not again or len(new.prefill_token_ids) == len(new.prompt_token_ids)
        yield SequenceGroupMetadata(
            new.req_id, is_prompt, chunk.get(new.req_id, 0), new.num_computed_tokens
        )
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, computed, generated in zip(
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
    ):
        yield SequenceGroupMetadata(request_id, generated == 0, chunk.get(request_id, 0), computed)


def bind_executor(owner: ExecutorOwner, distributed_id: str) -> type:
    """Make vLLM's executor of ranks that schedule for themselves ask `owner` once per batch.

    Pipeline stages are run as under an executor of all ranks, and exchange outputs and the sizes of
    their caches here; vLLM's config of such an engine must name the class made here as executor.

    Args:
        owner: held weakly, so that dropping the owner drops the engine.
        distributed_id: text that is the same on all ranks of the replica and used by no other job
            on the host; vLLM's CPU communicator names its shared memory after it.
    """
    from vllm.distributed import get_pp_group
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    reference = weakref.ref(owner)

    class ChatLearnExecutor(ExecutorWithExternalLauncher):
        supports_pp = True
        _stages: PipelineStages | None = None
        _request_ids: list[str]

        def _init_executor(self) -> None:
            if self.parallel_config.pipeline_parallel_size == 1:
                super()._init_executor()
                return
            whole, self.vllm_config = self.vllm_config, config_of_stage(self.vllm_config)
            super()._init_executor()
            self.vllm_config = whole
            self._stages = PipelineStages(get_pp_group(), whole.max_concurrent_batches)

        def get_kv_cache_specs(self) -> list[Any]:
            (own,) = super().get_kv_cache_specs()
            return [own] if self._stages is None else self._stages.of_all(own)

        def determine_available_memory(self) -> list[int]:
            (least,) = super().determine_available_memory()  # of all ranks
            return [least] * self.parallel_config.pipeline_parallel_size

        def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
            own = 0 if self._stages is None else self._stages.number
            super().initialize_from_config([kv_cache_configs[own]])

        def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
            parent = super()

            def execute() -> Any:
                return parent.execute_model(scheduler_output, non_block=non_block)

            if self._stages is not None:
                self._request_ids = list(scheduler_output.num_scheduled_tokens)
            owner = reference()
            # A batch without tokens only tells the workers about finished requests.
            if owner is None or scheduler_output.total_num_scheduled_tokens == 0:
                return execute()
            return owner.on_step(Step(scheduler_output, execute))

        def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
            output = super().sample_tokens(grammar_output, non_block=non_block)
            if self._stages is not None:
                output = self._stages.exchange(self._request_ids, output)
            owner = reference()
            return output if owner is None else owner.take_sampled(output)

        def _distributed_args(self) -> tuple[str, int, int]:
            # torch.distributed is initialised before the engine, so the address is never dialled.
            _, rank, local_rank = super()._distributed_args()
            return f"tcp://127.0.0.1:{distributed_id}", rank, local_rank

    return ChatLearnExecutor
