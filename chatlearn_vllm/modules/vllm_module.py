"""What does a user subclass to generate with vLLM, and how does a batch of prompts pass through?"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn_vllm.data.carried import Asked, Begun, Carried
from chatlearn_vllm.data.seeds import sample_seed
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.receives_weights import DRAFT, IncomingWeights, ReceivesWeights
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.utils.vllm_utils import get_model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from chatlearn_vllm.engines.generation_engine import GenerationEngine
    from chatlearn_vllm.engines.live_model import LiveModel
    from chatlearn_vllm.engines.speculation import SpeculationStats
    from chatlearn_vllm.engines.vllm_executor import Step
    from chatlearn_vllm.modules.policy_weights import PolicyWeights

logger = get_logger(__name__)


@dataclass(frozen=True)
class TokenizerGroup:
    """Holds the policy's Hugging Face tokenizer as `.tokenizer`, where ChatLearn's users look."""

    tokenizer: Any


class VLLMModule(BaseModule, ReceivesWeights, ABC):
    """A policy that generates with vLLM.

    A subclass writes five hooks; each has a usable default, reached with `super()`. Per episode
    and on every rank of a replica the framework calls `generate`, which calls

        _add_request(prompts)              prompts enter the engine
        forward_step(data, iteration)      per scheduler step, between scheduler and model
            execute_step(data)             hands the scheduled batch to vLLM
        decode_internal(request_outputs)   on the replica's first rank

    first and last of these once per call: a call may bring further prompts while earlier ones are
    being answered, and return before all are.

    For evaluation `eval_forward` is called instead of `forward_step`.
    """

    def __init__(self, name: str, job: Any = None, replica_id: int = 0) -> None:
        """See `BaseModule`.

        Raises:
            RuntimeError: vLLM is missing or of an unsupported version.
        """
        super().__init__(name, job, replica_id)
        if self.model_args.inference_engine == "vllm":
            from chatlearn_vllm.engines.vllm_compat import installed_version

            installed_version()
        self.model: nn.Module | None = None
        """This rank's live vLLM model, once `setup` ran."""
        self._engine: GenerationEngine | None = None
        self._datasets: dict[bool, Any] = {}
        self._step: Step | None = None
        self._iteration = 0
        self._is_eval = False
        self._has_told_no_logprobs = False
        self._asking: Iterator[Asked] = iter(())
        """What those prompts of `_add_request` stand for that are still to be added."""
        self._asked: dict[str, Asked] = {}
        """By the ids of the requests in the engine."""

    # ---- what users write -------------------------------------------------------------------

    @abstractmethod
    def build_dataset(self, train_prompts: list[Any], is_eval: bool = False) -> Any:
        """Tokenize prompts. Every rank of every replica; once for training, once for evaluation.

        Args:
            train_prompts: what the job's `set_dataset` was given: strings, or dicts of a jsonl.
            is_eval: whether these are the evaluation prompts.

        Returns:
            A sequence of dicts with `input_ids` and `prompt`; other fields travel with the sample.
            Its `collate_fn` makes a dict of lists from a list of items.
        """
        from chatlearn_vllm.data.prompts import VLLMPromptPipeline

        args = self.model_args
        return VLLMPromptPipeline(
            train_prompts,
            args["seq_length"] - args["max_new_tokens"],
            self.tokenizer.tokenizer,
            args["prompt_key"],
        )

    @abstractmethod
    def model_provider(self) -> nn.Module:
        """Define the model. Every rank, once.

        The default builds the vLLM engine for the architecture in `load`'s config.json and returns
        this rank's live `nn.Module`. A subclass with a model of its own registers it with
        `vllm.ModelRegistry` and calls `super().model_provider()`.
        """
        return self._build_engine().model

    @abstractmethod
    def _add_request(self, data: dict[str, list], is_eval: bool = False) -> Any:
        """Pass collated prompts to the engine. Every rank, once per batch of prompts.

        Adds one request per prompt, in order.

        Args:
            data: what the dataset's `collate_fn` made; lists of equal length.
            is_eval: whether to sample with the `eval_*` keys.
        """
        return self._add_request_internal(data["prompt"], data["input_ids"], is_eval=is_eval)

    @abstractmethod
    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> Any:
        """Run one scheduled batch. Every rank, once per scheduler step; call `execute_step` once.

        Args:
            data: `seq_group_metadata_list` (a sequence, built when first read),
                `blocks_to_swap_in`, `blocks_to_swap_out`, `blocks_to_copy` (empty: the V1 engine
                recomputes instead of swapping) and `scheduler_output` (vLLM's own object).
            iteration: scheduler steps so far for this batch of prompts.

        Returns:
            What `execute_step` returned.
        """
        return self.execute_step(data)

    @abstractmethod
    def decode_internal(self, batched_outputs: list[Any]) -> dict[str, Any]:
        """Turn finished requests into a batch. First rank of each replica.

        Args:
            batched_outputs: `vllm.RequestOutput`s in request order, `n` completions in each.

        Returns:
            A batch as described in `chatlearn_vllm/data/batch.py`.
        """
        from chatlearn_vllm.data.rollouts import rollouts_to_batch

        return rollouts_to_batch(
            batched_outputs, self.model_args["seq_length"], self.tokenizer.tokenizer.eos_token_id
        )

    def setup(self) -> None:
        """Make `self.model`. Every rank, once."""
        self.model = get_model(self.model_provider, self.model_args)

    def eval_forward(self, data: dict[str, Any], iteration: int = 0) -> Any:
        """Like `forward_step`, during evaluation."""
        return self.forward_step(data, iteration)

    # ---- what users call --------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> TokenizerGroup:
        """The tokenizer of `tokenizer` in the yaml, by default that of `load`."""
        from transformers import AutoTokenizer

        trusts = bool(self.model_args.get("trust_remote_code", False))
        return TokenizerGroup(
            AutoTokenizer.from_pretrained(self._tokenizer_dir(), trust_remote_code=trusts)
        )

    def _add_request_internal(
        self,
        prompt_list: list[str],
        prompt_token_id_list: list[list[int]],
        is_eval: bool | None = None,
    ) -> None:
        """Add prompts to the engine with the yaml's sampling keys and a seed for each response.

        Those of `_add_request`, in order; all at once, or with several calls.

        Args:
            prompt_list: their texts.
            prompt_token_id_list: their tokens.
            is_eval: whether to sample with the `eval_*` keys; None: as the prompts are asked for.

        Raises:
            ValueError: a prompt is no text with its tokens, leaves no room for a response, is one
                too many, or vLLM refuses it.
        """
        from chatlearn_vllm.data.prompts import require_prompt
        from chatlearn_vllm.engines.vllm_arguments import max_response_tokens
        from chatlearn_vllm.engines.vllm_partial import PartialRequest

        args = self.model_args
        is_eval = self._is_eval if is_eval is None else is_eval
        sampling = self._sampling(is_eval)
        for row, (prompt, ids) in enumerate(zip(prompt_list, prompt_token_id_list, strict=True)):
            room = max_response_tokens(args, len(ids))
            require_prompt(row, prompt, ids, room, args.seq_length)
            if (one := next(self._asking, None)) is None:
                raise ValueError(
                    f"{type(self).__name__}._add_request() adds more requests than it got prompts"
                )
            ordinal = one.first_sample
            seed = sample_seed(args.seed, ordinal, is_eval)
            request = {"max_tokens": room, "seed": seed} | sampling
            if self._is_partial(is_eval):
                begun = one.begun
                begun += [Begun() for _ in range(sampling["n"] - len(begun))]
                self.engine.add_partial_request(
                    PartialRequest(str(ordinal), prompt, ids, request, begun)
                )
            else:
                self.engine.add_request(str(ordinal), prompt, ids, request)

    def _sampling(self, is_eval: bool) -> dict[str, Any]:
        """The yaml's sampling keys as arguments of a request."""
        from chatlearn_vllm.engines.stop_tokens import with_stop_tokens
        from chatlearn_vllm.engines.vllm_arguments import sampling_arguments

        sampling = sampling_arguments(self.model_args, is_eval=is_eval)
        if not sampling.get("stop"):
            return sampling
        return with_stop_tokens(sampling, self.tokenizer.tokenizer, f"models.{self.name}")

    def execute_step(
        self,
        seq_group_metadata_list: Any,
        blocks_to_swap_in: Any = None,
        blocks_to_swap_out: Any = None,
        blocks_to_copy: Any = None,
    ) -> Any:
        """Hand the scheduled batch to vLLM; call it once per `forward_step`.

        Takes the whole `data` of `forward_step`, or its four entries one by one. What is executed
        is always the batch that vLLM scheduled.

        Returns:
            vLLM's handle of the running batch (a future, or None), to be returned by
            `forward_step`. Tokens are sampled later, so it holds none.
        """
        if self._step is None:
            raise RuntimeError("execute_step() is only valid inside forward_step()")
        return self._step.execute()

    @property
    def engine(self) -> GenerationEngine:
        """This rank's engine.

        Raises:
            RuntimeError: it is not built yet.
        """
        if self._engine is None:
            raise RuntimeError(f"{self.name}: the engine is built by model_setup()")
        return self._engine

    # ---- what the framework calls -----------------------------------------------------------

    def preload(self) -> None:
        """Import the engine's library; vLLM takes seconds."""
        if self.model_args.inference_engine == "vllm":
            from chatlearn_vllm.engines.vllm_compat import import_vllm

            import_vllm()
        elif self.model_args.inference_engine == "transformers":
            import chatlearn_vllm.engines.hf_engine  # noqa: F401

    def init(self) -> None:
        """Join the process group of the replica's tensor and pipeline parallel ranks."""
        from chatlearn_vllm.engines.process_group import join_process_group

        join_process_group(self.model_args.distributed_timeout_minutes)

    def model_setup(self) -> None:
        """Run the user's `setup`, and build the engine if that did not."""
        self._sampling(is_eval=False)  # says what is wrong with it
        self.setup()
        self._build_engine()
        if self.model is None:
            self.model = self.engine.model

    def _build_engine(self) -> GenerationEngine:
        if self._engine is None:
            from chatlearn_vllm.modules.policy_engine import make_engine

            self._engine = make_engine(self, Path(self.model_args.load or self._tokenizer_dir()))
        return self._engine

    def _tokenizer_dir(self) -> str:
        directory = self.model_args.tokenizer or self.model_args.load
        if directory is None:
            raise ValueError(
                f"models.{self.name}: set `tokenizer` (or `load`) to a Hugging Face directory"
            )
        return str(directory)

    def build_prompts(self, prompts: list[Any], is_eval: bool = False) -> int:
        """Build and keep the dataset; returns the number of its prompts."""
        from chatlearn_vllm.data.prompts import require_dataset

        dataset = self.build_dataset(prompts, is_eval=is_eval)
        hook = f"{type(self).__name__}.build_dataset(is_eval={is_eval})"
        require_dataset(dataset, hook, len(prompts))
        num_cut = getattr(dataset, "num_cut", 0)
        if num_cut and self.rank == self.replica_id == 0:
            logger.warning(
                "%s: %d of %d prompts%s are longer than the tokens that a prompt may have and lost "
                "their beginnings; raise seq_length, or lower max_new_tokens",
                self.name, num_cut, len(dataset), " of the evaluation" if is_eval else "",
            )  # fmt: skip
        self._datasets[is_eval] = dataset
        return len(dataset)

    def generate(
        self,
        prompt_indices: list[int],
        first_sample: int,
        iteration: int = 0,
        is_eval: bool = False,
        min_finished: int | None = None,
        max_steps: int | None = None,
        carried: Sequence[Carried] = (),
    ) -> dict[str, Any] | None:
        """Answer prompts. Collective over the replica: all its ranks, with equal arguments.

        Args:
            prompt_indices: rows of the dataset; may be empty to go on with earlier ones.
            first_sample: ordinal, over the whole job, of the first response; makes seeds unique.
            iteration: episode, for logs.
            is_eval: use the evaluation dataset, sampling keys and `eval_forward`.
            min_finished: return when so many prompts are answered, those of earlier calls
                included; the others go on with the next call. None: all of them.
            max_steps: return after so many scheduler steps in any case.
            carried: prompts that an earlier episode did not finish; they come first.

        Returns:
            On the first rank the batch of the answered prompts in the order in which they were
            given, with `prompt_index`, `sample_index`, `weight_version` and the dataset's extra
            fields added; None on the others, and if there was nothing left to answer.
        """
        if not self.engine.requests:
            self._asked = {}
            self._iteration = 0
        self._is_eval = is_eval
        try:
            copies = 1 if is_eval else self.model_args.responses_per_prompt
            dataset = self._datasets[is_eval]
            self._ask(
                [
                    Asked(
                        one.prompt_index, one.first_sample, dataset[one.prompt_index], one.responses
                    )
                    for one in carried
                ]
                + [
                    Asked(index, first_sample + row * copies, dataset[index], [])
                    for row, index in enumerate(prompt_indices)
                ],
                is_eval,
            )
            if (speculation := self.engine.speculation) is not None:
                measures = self.model_args.speculative_min_gain > 0
                speculation.begin(is_eval=is_eval, measures=measures)
            outputs = self.engine.run(min_finished, max_steps)
        except BaseException:
            self.engine.abort()
            raise
        if self.model_args.log_metrics and self.rank == 0:
            logger.info("%s: %s", self.name, self.engine.metrics())
        asked = [self._asked.pop(output.request_id) for output in outputs]
        if self.rank != 0 or not outputs:
            return None
        return self._batch_of(outputs, asked)

    def cut(self) -> list[Carried] | None:
        """End the rollout; collective over the replica.

        Returns:
            On the first rank what is left of each prompt that is not answered, with `num_rounds` 0;
            None on the others.
        """
        cut = self.engine.cut()
        asked = [self._asked.pop(request.request_id) for request in cut]
        if self.rank != 0:
            return None
        return [
            Carried(one.prompt_index, one.first_sample, 0, request.begun)
            for one, request in zip(asked, cut, strict=True)
        ]

    def _is_partial(self, is_eval: bool) -> bool:
        return not is_eval and self.runtime_args.max_rollout_round > 1

    def _ask(self, asking: list[Asked], is_eval: bool) -> None:
        """Pass prompts to the engine, and remember which request stands for which of them."""
        if not asking:
            return
        num_before = len(self.engine.requests)
        self._asking = iter(asking)
        data = self._datasets[is_eval].collate_fn([one.record for one in asking])
        # ChatLearn's documents show it without the argument, too.
        keywords = {"is_eval": is_eval} if _takes(self._add_request, "is_eval") else {}
        self._add_request(data, **keywords)
        added = self.engine.requests[num_before:]
        if len(added) != len(asking):
            raise ValueError(
                f"{type(self).__name__}._add_request() added {len(added)} requests for "
                f"{len(asking)} prompts; it must add one for each, in order"
            )
        self._asked |= zip(added, asking, strict=True)

    def _batch_of(self, outputs: list[Any], asked: list[Asked]) -> dict[str, Any]:
        """The user's batch of finished requests, with what the framework adds to it."""
        import torch

        from chatlearn_vllm.data.batch import check_rollout_shapes
        from chatlearn_vllm.data.prompts import record_columns

        counts = [len(output.outputs) for output in outputs]
        batch = self.decode_internal(outputs)
        try:
            check_rollout_shapes(batch, sum(counts), self.model_args.seq_length)
        except ValueError as error:
            raise ValueError(
                f"models.{self.name}: what {type(self).__name__}.decode_internal() made of "
                f"{sum(counts)} responses {error}"
            ) from None
        if "logprobs" not in batch and not self._is_eval and not self._has_told_no_logprobs:
            self._has_told_no_logprobs = True
            logger.warning(
                "%s: what %s.decode_internal() made has no `logprobs`: no trainer compares these "
                "rollouts with its own weights; keep what super().decode_internal() returns",
                self.name,
                type(self).__name__,
            )
        rows = [
            (one, number)
            for one, count in zip(asked, counts, strict=True)
            for number in range(count)
        ]
        batch["prompt_index"] = torch.tensor([one.prompt_index for one, _ in rows])
        batch["sample_index"] = torch.tensor([one.first_sample + number for one, number in rows])
        batch["weight_version"] = torch.full((len(rows),), self.engine.state.version)
        if self.model_args.beam_width(is_eval=self._is_eval) > 1:
            scores = [beam.score for output in outputs for beam in output.outputs]
            batch["beam_scores"] = torch.tensor(scores)
        if self._is_partial(self._is_eval):
            batch["begun"] = [one.begun[number] for one, number in rows]
            batch["token_versions"] = self._token_versions(batch)
        columns = record_columns([one.record for one, _ in rows], but=("input_ids", "prompt"))
        return columns | batch

    def _token_versions(self, batch: dict[str, Any]) -> torch.Tensor:
        """[B, S-1]: the weight version that sampled each token of the responses, else -1."""
        import torch

        versions = torch.full_like(batch["loss_mask"][:, 1:], -1, dtype=torch.int64)
        for row, begun in enumerate(batch["begun"]):
            start = len(batch["no_padded_query_ids"][row]) - 1
            versions[row, start : start + len(begun.versions)] = torch.tensor(begun.versions)
        return versions

    def on_step(self, step: Step) -> None:
        """Pass one scheduled batch through the user's hook; called by the engine."""
        from chatlearn_vllm.engines.vllm_executor import SequenceGroupMetadataList

        data = {
            "seq_group_metadata_list": SequenceGroupMetadataList(step.scheduler_output),
            "blocks_to_swap_in": [],
            "blocks_to_swap_out": [],
            "blocks_to_copy": [],
            "scheduler_output": step.scheduler_output,
        }
        hook = self.eval_forward if self._is_eval else self.forward_step
        self._step = step
        try:
            returned = hook(data, self._iteration)
        finally:
            self._step = None
        step.check_done(returned, f"{type(self).__name__}.{hook.__name__}()")
        self._iteration += 1

    def take_speculation_stats(self) -> SpeculationStats:
        """What drafting did on this rank since the last call; for an engine that drafts."""
        return self.engine.speculation.take_stats()

    def set_speculation(self, is_on: bool) -> None:
        """Draft from the next rollout on, or not; on all ranks of a replica."""
        self.engine.speculation.set_on(is_on)

    def memory_keys(self) -> list[str]:
        """See BaseModule."""
        args = self.model_args
        if args.inference_engine == "transformers":
            return [f"model_args.max_num_seqs: {args.max_num_seqs} -> {args.max_num_seqs // 2}"]
        keys = [
            f"model_args.gpu_memory_utilization: {args.gpu_memory_utilization:g} -> lower, if "
            "others need the device; higher, if there is no room for the KV cache",
            f"model_args.max_num_seqs: {args.max_num_seqs} -> {max(1, args.max_num_seqs // 2)}",
        ]
        if not args.enforce_eager:
            keys.append("model_args.enforce_eager: True  (no memory for CUDA graphs, slower)")
        return keys

    def engine_state(self) -> str:
        """The engine's state as text, for example `READY(3)`."""
        return str(self.engine.state)

    def sleep(self) -> None:
        """Give device memory back at `sleep_level`."""
        self.engine.sleep(self.model_args.sleep_level)

    def wake_weights(self) -> None:
        """Take the weights' memory back."""
        self.engine.wake_weights()

    def wake_kv_cache(self) -> None:
        """Take the KV cache's memory back."""
        self.engine.wake_kv_cache()

    def shutdown(self) -> None:
        """Release what would outlive the process."""
        if self._engine is not None:
            self._engine.close()

    def weight_gpu(self) -> tuple[str | None, frozenset[str]]:
        """UUID of the GPU that holds this rank's weights, and of those that it can read."""
        from chatlearn_vllm.weight_sync.cuda_ipc import gpu_and_peers

        return gpu_and_peers(self.engine.device)

    @cached_property
    def _weights(self) -> PolicyWeights:
        return self._receiving_end(self.engine, "new weights")

    @cached_property
    def _draft_weights(self) -> PolicyWeights:
        if self.engine.draft is None:
            raise ValueError(f"models.{self.name}: speculative_config names no model that drafts")
        return self._receiving_end(self.engine.draft, "new weights of the draft")

    def _incoming(self, part: str) -> IncomingWeights:
        return self._draft_weights if part == DRAFT else super()._incoming(part)

    def _receiving_end(self, model: LiveModel, what: str) -> PolicyWeights:
        from chatlearn_vllm.modules.policy_weights import PolicyWeights

        weights = PolicyWeights(model, self.model_args.weight_sync_path)
        if self.rank == 0 and self.replica_id == 0 and not weights.is_direct:
            logger.info("%s: %s go through vLLM's loader: %s", self.name, what, weights.reason)
        return weights


def _takes(function: Any, name: str) -> bool:
    """Whether a function has an argument of this name, or takes any."""
    parameters = inspect.signature(function).parameters.values()
    return any(one.name == name or one.kind is one.VAR_KEYWORD for one in parameters)
