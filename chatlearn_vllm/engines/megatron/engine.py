"""What can be done with a model on megatron-core: train, score, save, move out of the way."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_layer import MoELayer

from chatlearn_vllm.engines.megatron import (
    checkpoint,
    hf_checkpoint,
    lora,
    offload,
    optimizer,
    parallel,
)
from chatlearn_vllm.engines.megatron.architectures import transformer_config
from chatlearn_vllm.engines.megatron.attention import check_takes_packed, packed_seq_params
from chatlearn_vllm.engines.megatron.batching import Batching
from chatlearn_vllm.engines.megatron.cpu import cuda_means_cpu
from chatlearn_vllm.engines.megatron.files import read_json
from chatlearn_vllm.engines.megatron.init_weights import fill_weights
from chatlearn_vllm.engines.megatron.logprobs import vocab_parallel_logprobs
from chatlearn_vllm.engines.megatron.micro_batches import (
    ModelInput,
    to_device,
)
from chatlearn_vllm.engines.megatron.model import (
    ModelProvider,
    build_chunks,
    build_gpt_model,
    in_training_dtype,
)
from chatlearn_vllm.engines.megatron.parameters import LocalParameters
from chatlearn_vllm.engines.megatron.peft_checkpoint import save_peft
from chatlearn_vllm.engines.megatron.scalar_head import (
    hf_config_with_scalar_head,
    with_scalar_head,
)
from chatlearn_vllm.engines.megatron.settings import check_settings, transformer_settings
from chatlearn_vllm.engines.process_group import join_process_group
from chatlearn_vllm.layouts import Head, ModelShape

if TYPE_CHECKING:
    from chatlearn_vllm.config import ModelArgs
    from chatlearn_vllm.data.batch import Batch

Stats = dict[str, torch.Tensor]
LossFn = Callable[..., tuple[torch.Tensor, Stats]]
"""(micro-batch, logprobs [b, S'-1], entropy [b, S'-1]) -> loss to be summed, sums to be summed.
With a scalar head: (micro-batch, values [b, S']), entry t computed from the tokens up to t."""
ScoreFn = Callable[..., torch.Tensor]
"""The same arguments -> [b, ...]."""


class MegatronEngine:
    """One rank's part of a model, its optimizer if it is trained, and the schedules that run them.

    Every public method is collective over the ranks of the replica unless it says otherwise.
    """

    parameters: LocalParameters
    """What this rank holds, by name and by layout; there from `build` on."""

    def __init__(
        self,
        args: ModelArgs,
        *,
        trainable: bool,
        head: Head = "lm",
        model_provider: ModelProvider | None = None,
    ) -> None:
        """Join the process group, cut it into parallel groups and read config.json.

        The model itself is built by `build`.

        Args:
            args: settings of the model, parallel sizes included.
            trainable: whether gradients and an optimizer are needed.
            head: what the model ends with; decides what loss and score functions are given.
            model_provider: builds a chunk of the model; None for `default_model_provider`. A scalar
                head takes the place of the output layer that it builds.

        Raises:
            ValueError: a setting contradicts the number of ranks, config.json or another setting.
        """
        self.args = args
        self.trainable = trainable
        self.head: Head = head
        self.is_head_new = False
        """Whether `build` found no weights of the scalar head."""
        self._provider = model_provider or self.default_model_provider
        check_settings(args, trainable=trainable, head=head)
        self.hf_directory = self._find_hf_directory()
        self.hf_config = read_json(self.hf_directory / "config.json")
        self.shape = ModelShape.from_hf_config(self.hf_config, head)
        join_process_group(args.distributed_timeout_minutes)
        parallel.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            timeout_minutes=args.distributed_timeout_minutes,
        )
        self.device = parallel.device()
        with cuda_means_cpu():
            parallel.seed_everything(args.seed)
        self.config = transformer_config(self.hf_config, **transformer_settings(args))
        self.batching = Batching(args, self.config, self.device)
        if self.batching.has_own_lengths:
            # Pipeline stages tell each other the shapes. TransformerConfig refuses this as an
            # argument with its default dispatcher of tokens to experts, even without experts: that
            # one needs equal shapes on ranks that share experts. `batching` gives them.
            self.config.variable_seq_lengths = True
        self.chunks: list[GPTModel] = []
        self._modules: list[torch.nn.Module] = []
        self.optimizer = None
        self.scheduler = None
        self._unfinished_save: checkpoint.UnfinishedSave | None = None

    # ---------------------------------------------------------------- building

    @cuda_means_cpu()
    def build(self) -> None:
        """Build the model, fill its weights, and build the optimizer if it is trained."""
        provider = with_scalar_head(self._provider) if self.head == "scalar" else self._provider
        self.chunks = build_chunks(self.config, provider, self.device)
        if self.args.sequence_packing:
            check_takes_packed(self.chunks)
        modules = [in_training_dtype(self.config, chunk) for chunk in self.chunks]
        for parameter in (p for chunk in self.chunks for p in chunk.parameters()):
            parameter.requires_grad_(self.trainable)
        self.parameters = LocalParameters(self.chunks, self.config, self.shape, self.args)
        self._fill_weights()
        if self.trainable and self.args.lora_r:
            lora.add_adapters(self.chunks, self.args)
        if self.trainable:
            modules = optimizer.wrap_data_parallel(self.config, modules, self.args)
            self.optimizer = optimizer.build_optimizer(self.config, modules, self.args)
            self.scheduler = optimizer.build_scheduler(self.optimizer, self.args)
        self._modules = modules
        self._build_offloaders()

    def _fill_weights(self) -> None:
        self.is_head_new = fill_weights(
            self.parameters.laid_out(), self.hf_directory, self.hf_config, self.shape, self.args
        )

    @cuda_means_cpu()
    def default_model_provider(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ) -> GPTModel:
        """The model that config.json describes; see `build_gpt_model`. Not collective."""
        return build_gpt_model(
            self.config,
            self.hf_config,
            share_embeddings_and_output_weights=self.shape.tie_word_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )

    def _find_hf_directory(self) -> Path:
        directory = self.args.load or self.args.tokenizer
        if not directory:
            raise ValueError(
                "load: must name a Hugging Face directory with config.json "
                "(without weights beside it, training starts from random ones)"
            )
        return Path(directory)

    # ---------------------------------------------------------------- running

    @cuda_means_cpu()
    def train_step(
        self, micro_batches: list[Batch], loss_fn: LossFn
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Compute gradients over some micro-batches and update the weights once.

        The loss is the *sum* of what `loss_fn` returns for all micro-batches of all data parallel
        ranks, so `loss_fn` must divide by numbers of the whole global batch.

        Args:
            micro_batches: this data parallel rank's, in the form of data/batch.py; the same on all
                its tensor and pipeline parallel ranks, and equally many on all data parallel
                ranks. Of equal size, unless max_tokens_per_micro_batch or sequence_packing is
                set.
            loss_fn: called on the last pipeline stage, on trimmed micro-batches on the device.

        Returns:
            On all ranks, {"loss", "grad_norm" (before clipping), "lr", "update_skipped" (1.0 where
            fp16 gradients overflowed)} and the sums of `loss_fn` over all micro-batches and ranks.
        """
        assert self.trainable, "the model was built without an optimizer"
        self._require_onloaded(self._weights, self._grads, self._optimizer_states)
        for module in self._modules:
            module.train()
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._forward_backward(micro_batches, loss_fn)
        # The k-th update uses the schedule's k-th value, so that a warm-up does not start with 0.
        self.scheduler.step(1)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        is_updated, grad_norm, _ = self.optimizer.step()
        if not is_updated:
            self.scheduler.step(-1)  # overflows of fp16 would use up the warm-up
        self._sync_parameters()
        metrics = {
            "loss": sums.pop("loss"),
            "grad_norm": float(grad_norm) if is_updated else 0.0,
            "lr": learning_rate,
            "update_skipped": float(not is_updated),
        }
        return metrics, sums

    @cuda_means_cpu()
    @torch.no_grad()
    def forward_only(self, micro_batches: list[Batch], score_fn: ScoreFn) -> list[torch.Tensor]:
        """Run the model without gradients.

        Args:
            micro_batches: as for `train_step`; data parallel ranks of a model without experts may
                have different numbers of micro-batches and rows here.
            score_fn: called on the last pipeline stage, on trimmed micro-batches on the device.

        Returns:
            What `score_fn` returned for each micro-batch, on the CPU of all ranks that share the
            micro-batches.
        """
        self.require_weights()
        for module in self._modules:
            module.eval()
        results = self._run_schedule(micro_batches, score_fn, forward_only=True)
        return parallel.broadcast_from_last_stage([result.cpu() for result in results])

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Within the block the model is the one that training started from. Not collective.

        Example:
            with engine.adapters_disabled():
                reference = engine.forward_only(micro_batches, score_fn)
        """
        with lora.adapters_disabled(self.chunks):
            yield

    def _forward_backward(self, micro_batches: list[Batch], loss_fn: LossFn) -> dict[str, float]:
        """Accumulate gradients; return the sums of the statistics over all ranks."""
        # megatron-core divides the loss by the number of micro-batches (in place!) and averages
        # gradients over data parallel ranks; `loss_fn` is summed, so undo both.
        scale = len(micro_batches) * parallel_state.get_data_parallel_world_size()

        def scaled(batch: Batch, *outputs: torch.Tensor) -> tuple[torch.Tensor, Stats]:
            loss, stats = loss_fn(batch, *outputs)
            stats = {**stats, "loss": loss}
            return loss * scale, {
                key: value.detach().to(torch.float32, copy=True) for key, value in stats.items()
            }

        collected = self._run_schedule(micro_batches, scaled, forward_only=False)
        totals: dict[str, float] = {}
        if parallel.is_on_last_stage():
            names = sorted(collected[0])
            sums = torch.stack([sum(stats[name] for stats in collected) for name in names])
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
            totals = dict(zip(names, sums.tolist(), strict=True))
        return parallel.broadcast_from_last_stage(totals)

    def _run_schedule(
        self, micro_batches: list[Batch], output_fn: Callable, *, forward_only: bool
    ) -> list[Any]:
        """Drive megatron-core's pipeline schedule; results on the last stage, else empty."""
        inputs = self.batching.model_inputs(micro_batches)
        iterators = [iter(inputs) for _ in self._modules]
        num_rows, length = inputs[0].shape  # of all, where stages do not tell each other
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, output_fn),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._modules if len(self._modules) > 1 else self._modules[0],
            num_microbatches=len(inputs),
            seq_length=length,
            micro_batch_size=num_rows,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _forward_step(
        self, output_fn: Callable, iterator: Iterator[ModelInput], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable]:
        """One micro-batch through one chunk; megatron-core calls it."""
        micro_batch = next(iterator)
        # [b, s], or [1, s] if packed
        tokens = micro_batch.tokens().to(self.device, non_blocking=True)
        positions = micro_batch.positions().to(self.device, non_blocking=True)
        options: dict[str, Any] = {}
        if self.config.bf16 or self.config.fp16:
            options["fp32_output"] = False
        if micro_batch.row_lengths:
            options["packed_seq_params"] = packed_seq_params(micro_batch.part_lengths, self.device)
        # at the end logits [b, s, V / tp], or values [b, s, 1]
        output = module(tokens, positions, None, **options)
        return output, partial(self._finish, output_fn, micro_batch, tokens)

    def _finish(
        self,
        output_fn: Callable,
        micro_batch: ModelInput,
        tokens: torch.Tensor,
        output: torch.Tensor,
        non_loss_data: bool = False,
    ) -> Any:
        """The model's output on a micro-batch -> what the caller asked for. On the last stage."""
        batch = to_device(micro_batch.batch, self.device)
        if self.head == "scalar":
            return output_fn(batch, micro_batch.by_row(output.squeeze(-1), num_left_out=0))
        # A target for each position, counting or not: cutting the logits would copy them.
        logprobs, entropy = vocab_parallel_logprobs(
            output,
            F.pad(tokens[:, 1:], (0, 1)),
            vocab_size=self.shape.vocab_size,
            temperature=self.args.temperature,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        return output_fn(batch, micro_batch.by_row(logprobs), micro_batch.by_row(entropy))

    def _sync_parameters(self) -> None:
        """Let every rank see the updated weights now.

        With overlap_param_gather they would arrive with the next forward pass only, and whoever
        reads them before (weight sync, save) would see other ranks' old shards.
        """
        if self.args.overlap_param_gather:
            for module in self._modules:
                module.start_param_sync(force_sync=True)

    # ---------------------------------------------------------------- ranks

    @property
    def data_parallel_rank(self) -> int:
        """Which shard of a training batch this rank works on."""
        return parallel_state.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        """Number of shards of a training batch."""
        return parallel_state.get_data_parallel_world_size()

    def all_reduce_data_parallel(
        self, values: list[float], op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> list[float]:
        """Combine numbers of the data parallel ranks; the result on all of them, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op, group=parallel_state.get_data_parallel_group())
        return tensor.tolist()

    # ---------------------------------------------------------------- checkpoints

    def save_hf(
        self, directory: str | Path, *, max_file_bytes: int = hf_checkpoint.MAX_FILE_BYTES
    ) -> None:
        """Write the weights, config.json and the tokenizer for transformers and vLLM.

        With a scalar head it is a *ForSequenceClassification model.

        Adapters are merged into the weights that are written, not into those in memory. They are
        also written by themselves, for the PEFT library, to <directory>/adapter.
        """
        self.require_weights()
        hf_config, sources = self._hf_files()
        parameters = self.parameters.laid_out_once()
        hf_checkpoint.save_hf(
            Path(directory),
            parameters,
            self.shape,
            hf_config,
            side_files_from=sources,
            max_file_bytes=max_file_bytes,
            value_of=self.parameters.with_adapters(),
        )
        if self.trainable and self.args.lora_r:
            adapters = self.parameters.adapters()
            save_peft(Path(directory, "adapter"), parameters, adapters, self.shape, self.args)

    def _hf_files(self) -> checkpoint.HFFiles:
        """config.json of what is trained, and where its tokenizer is."""
        sources = [self.hf_directory]
        if self.args.tokenizer:
            sources.append(Path(self.args.tokenizer))
        hf_config = self.hf_config
        if self.head == "scalar":
            hf_config = hf_config_with_scalar_head(hf_config, sources)
        return checkpoint.HFFiles(hf_config, sources)

    @cuda_means_cpu()
    def save_checkpoint(
        self, directory: str | Path, iteration: int, *, in_background: bool = False
    ) -> None:
        """Write everything that resuming needs to <directory>/iter_<iteration>.

        With `in_background` it is there after `finish_checkpoint` only, which all other methods
        for checkpoints call first. The weights may change and move in the meantime.
        """
        self._require_onloaded(self._weights, self._optimizer_states)
        self.finish_checkpoint()
        save = checkpoint.UnfinishedSave(
            Path(directory),
            iteration,
            self._resumable(),
            self.args,
            self._hf_files(),
            in_background=in_background,
        )
        if in_background:
            self._unfinished_save = save
        else:
            save.finish()

    @property
    def is_checkpoint_written(self) -> bool:
        """Whether `finish_checkpoint` will not have to wait for this rank. Not collective."""
        return self._unfinished_save is None or self._unfinished_save.is_written

    @cuda_means_cpu()
    def finish_checkpoint(self) -> None:
        """Wait until what `save_checkpoint` writes in the background is there, if there is any.

        Raises:
            RuntimeError: a rank could not write it.
        """
        save, self._unfinished_save = self._unfinished_save, None
        if save is not None:
            save.finish()

    @cuda_means_cpu()
    def load_checkpoint(self, directory: str | Path, iteration: int | None = None) -> int | None:
        """Read what `save_checkpoint` wrote, with any parallel sizes.

        Args:
            directory: as given to `save_checkpoint`.
            iteration: which one; None for the newest.

        Returns:
            The iteration that was read; None if there is no checkpoint and none was asked for.
        """
        self._require_onloaded(self._weights, self._optimizer_states)
        self.finish_checkpoint()
        return checkpoint.load(Path(directory), iteration, self._resumable(), self.args)

    def _resumable(self) -> checkpoint.Resumable:
        return checkpoint.Resumable(self.chunks, self.optimizer, self.scheduler, self.head)

    # ---------------------------------------------------------------- memory

    def _build_offloaders(self) -> None:
        data_parallel = self._modules if self.trainable else []
        weights = partial(offload.weight_tensors, self.chunks, data_parallel)
        self._weights = offload.StorageOffloader(weights, keeps_content=True)
        self._grads = offload.StorageOffloader(
            partial(offload.grad_tensors, data_parallel), keeps_content=False
        )
        self._optimizer_states = offload.StorageOffloader(
            lambda: offload.optimizer_tensors(self.optimizer, weights()) if self.trainable else (),
            keeps_content=True,
        )

    def offload(self, *, weights: bool = True, optimizer: bool = True, grads: bool = True) -> int:
        """Move the chosen state to host memory, gradients to nowhere. Not collective.

        Returns:
            Bytes of device memory given back.
        """
        freed = 0
        # Optimizer first: it must see which of its tensors are views of the weights.
        if optimizer:
            freed += self._optimizer_states.offload()
        if grads:
            freed += self._grads.offload()
        if weights:
            freed += self._weights.offload()
        offload.clear_rotary_cache()
        return freed

    def onload(self, *, weights: bool = True, optimizer: bool = True, grads: bool = True) -> int:
        """Take the chosen state back. Not collective.

        Returns:
            Bytes of device memory taken.
        """
        chosen = (
            (weights, self._weights),
            (optimizer, self._optimizer_states),
            (grads, self._grads),
        )
        return sum(offloader.onload() for is_chosen, offloader in chosen if is_chosen)

    def weights_generation(self) -> int:
        """A number that rises whenever the weights' memory has moved. Not collective."""
        return self._weights.num_moves

    def require_weights(self) -> None:
        """Check that the weights are in device memory. Not collective.

        Raises:
            RuntimeError: they are offloaded.
        """
        self._require_onloaded(self._weights)

    def _require_onloaded(self, *offloaders: offload.StorageOffloader) -> None:
        if any(offloader.is_offloaded for offloader in offloaders):
            raise RuntimeError("the model is offloaded: call onload() before using it")

    def shutdown(self) -> None:
        """Let go of the model, and dissolve the parallel groups and the process group.

        A gloo group has threads that poll until the last reference to it is gone, and the model
        refers to most groups: all of these are dropped here.
        """
        for module in self._modules:
            if isinstance(module, DistributedDataParallel):
                module.grad_accs.clear()  # part of a cycle that python cannot see
        for module in (module for chunk in self.chunks for module in chunk.modules()):
            if isinstance(module, MoELayer):
                module.token_dispatcher = None  # it keeps the last step's graph: another one
        self.chunks, self._modules = [], []
        self.optimizer = self.scheduler = None
        self.parameters = self._weights = self._grads = self._optimizer_states = None
        self.config.no_sync_func = self.config.grad_scale_func = None
        offload.clear_rotary_cache()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        gc.collect()
