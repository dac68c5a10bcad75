"""What does a user subclass to train a model, or to score with one, on megatron-core?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist

from chatlearn_vllm.algorithms.aggregation import aggregate
from chatlearn_vllm.algorithms.mismatch import count_not_finite, mismatch_metrics, mismatch_sums
from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.data.relay_buffer import num_episodes_kept
from chatlearn_vllm.engines.megatron.checkpoint_files import prune
from chatlearn_vllm.engines.megatron.micro_batches import put_back, take
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.mismatch_guard import MismatchError, MismatchGuard
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.weight_sync.cuda_ipc import gpu_and_peers
from chatlearn_vllm.weight_sync.digest import Sample
from chatlearn_vllm.weight_sync.links import Links
from chatlearn_vllm.weight_sync.lora import adapter_names
from chatlearn_vllm.weight_sync.remote import LinkAddress, open_links
from chatlearn_vllm.weight_sync.sender import Sent, WeightSender
from chatlearn_vllm.weight_sync.transport import Export

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from chatlearn_vllm.config import ModelArgs, RuntimeConfig
    from chatlearn_vllm.engines.megatron.engine import LossFn, MegatronEngine, ScoreFn
    from chatlearn_vllm.layouts import Head, ShardedModel


logger = get_logger(__name__)


class MegatronModule(BaseModule, ABC):
    """A model on megatron-core: tensor, pipeline and data parallel, trained or frozen.

    Users implement `model_provider`, which may return `super().model_provider(...)`, and

    * to train: `loss`, or for full control `train_step`;
    * to score with a frozen model: `forward_step`, mostly around `compute_logprobs`.

    All methods that take data are called on every rank; the ranks of one data parallel copy get
    the same rows.
    """

    head: ClassVar[Head] = "lm"
    """What the model ends with. What says logprobs and entropy below is for "lm"; classes with a
    scalar head are in value_module.py and reward_module.py."""

    # megatron-core asserts it for tensor and sequence parallel. It puts all that a process does on
    # its GPU in one line, which engines that copy while they compute must not have.
    gpu_environment: ClassVar[dict[str, str]] = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}

    engine: MegatronEngine
    """Owns the model; there from `init` on."""

    _mismatch_guard: MismatchGuard
    """Knows the levels of the yaml; there from `init` on."""

    # ---------------------------------------------------------------- what users write

    @abstractmethod
    def model_provider(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ) -> GPTModel:
        """Build this pipeline stage's part of the model.

        Called on every rank, once per virtual stage. The body here builds what config.json in
        `load` describes.

        Args:
            pre_process: whether the part begins with the embedding.
            post_process: whether the part ends with the output layer.
            vp_stage: number of the virtual stage; passed only where there are several.
        """
        return self.engine.default_model_provider(pre_process, post_process, vp_stage)

    def loss(
        self, batch: Batch, logprobs: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss of every token of one micro-batch.

        Called on the last pipeline stage. Tensors are on the device and cut to S', the longest
        sequence of the optimizer step, or of the micro-batch where max_tokens_per_micro_batch or
        sequence_packing is set.

        Args:
            batch: see data/batch.py; `old_logprobs` [b, S'-1] with `logprobs` or `advantages`.
            logprobs: [b, S'-1] of softmax(logits / temperature), differentiable.
            entropy: [b, S'-1] of the same distribution, differentiable.

        Returns:
            The loss [b, S'-1], of which only what `loss_mask` marks counts, averaged as the yaml's
            `loss_agg` says over the whole global batch; and sums over the marked tokens (scalars),
            reported divided by the number of tokens of the global batch.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is trained: implement loss() or train_step()"
        )

    def train_step(self, data: list[Batch], iteration: int) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches.

        The result does not depend on how the global batch is cut into micro-batches and data
        parallel shards.

        Args:
            data: micro-batches, on the CPU. Of equal size, in the order of the rows; or, where
                max_tokens_per_micro_batch is set, of similar lengths, and some may be a copy of a
                row without any token in `loss_mask` (with virtual pipeline stages only).
            iteration: number of the episode.

        Returns:
            Metrics of the step, the same on all ranks.
        """

        def with_entropy(
            batch: Batch, logprobs: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            token_loss, sums = self.loss(batch, logprobs, entropy)
            mask = batch["loss_mask"][:, 1:]
            return token_loss, {"entropy": (entropy.detach() * mask).sum(), **sums}

        return self._step_on_tokens(data, with_entropy)

    def _step_on_tokens(self, data: list[Batch], token_loss_fn: LossFn) -> dict[str, float]:
        """One optimizer step on a loss [b, S'-1]; otherwise as `train_step`."""
        masks = [batch["loss_mask"][:, 1:] != 0 for batch in data]
        num_tokens, num_sequences = self.engine.all_reduce_data_parallel(
            [
                float(sum(mask.sum() for mask in masks)),
                float(sum(mask.any(1).sum() for mask in masks)),
            ]
        )
        how = self.model_args.loss_agg
        denominator = max(1.0, num_tokens if how == "token-mean" else num_sequences)

        def loss_fn(
            batch: Batch, *outputs: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            token_loss, sums = token_loss_fn(batch, *outputs)
            total = aggregate(
                token_loss,
                batch["loss_mask"][:, 1:],
                how,
                denominator=denominator,
                max_length=self.model_args.max_new_tokens,
            )
            return total, sums

        metrics, sums = self.engine.train_step(data, loss_fn)
        means = {name: value / max(1.0, num_tokens) for name, value in sums.items()}
        return {**means, **metrics, "tokens": num_tokens}

    # ---------------------------------------------------------------- what the framework calls

    def preload(self) -> None:
        """Import megatron-core."""
        import chatlearn_vllm.engines.megatron.engine  # noqa: F401

    def init(self) -> None:
        """Join the process group and the parallel groups. All ranks; once."""
        from chatlearn_vllm.engines.megatron.engine import MegatronEngine

        self.engine = MegatronEngine(
            self._engine_args(),
            trainable=self.module_args.trainable,
            head=self.head,
            model_provider=self.model_provider,
        )
        if self._global_batch_size() % self.data_parallel_size:
            raise ValueError(
                f"runtime.train_global_batch_size={self._global_batch_size()} must be a multiple "
                f"of the data parallel size of models.{self.name} = {self.data_parallel_size}"
            )
        self._mismatch_guard = MismatchGuard(
            warn=self.runtime_args.mismatch_warn.set_levels(),
            stop=self.runtime_args.mismatch_stop.set_levels(),
        )

    def model_setup(self) -> None:
        """Build the model, with its optimizer if it is trained. All ranks; once."""
        self.engine.build()
        self.setup()

    def train(self, data: Batch, iteration: int = 0) -> list[dict[str, float]]:
        """Train on one episode's samples, `num_training_epoch` times.

        Rows are taken in order: each optimizer step takes the next
        train_global_batch_size / data_parallel_size rows of every rank, the last step of an epoch
        what is left.

        Args:
            data: this data parallel rank's rows, equally many on each; see data/batch.py.
            iteration: number of the episode.

        Returns:
            Metrics of each optimizer step, the same on all ranks; none without rows. If the rollout
            sent `logprobs`, those of algorithms/mismatch.py compare them with this model's before
            the first step.

        Raises:
            MismatchError: on all ranks, before the first step: that comparison is above a level of
                `runtime.mismatch_stop`, or one side has log-probabilities that are not finite.
        """
        self._check_equal_rows(batch_size(data))
        common: dict[str, float] = {}
        if batch_size(data) and ("logprobs" in data or "advantages" in data):
            data = {**data, "old_logprobs": self.compute_logprobs(data)}
            if "logprobs" in data:
                common = self._compare_with_rollout(data, iteration)
        return [{**metrics, **common} for metrics in self._train_epochs(data, iteration)]

    def _train_epochs(self, data: Batch, iteration: int) -> list[dict[str, float]]:
        """Metrics of all optimizer steps on this rank's rows."""
        rows_per_step = self._global_batch_size() // self.data_parallel_size
        metrics = []
        for _ in range(self.runtime_args.num_training_epoch):
            for start in range(0, batch_size(data), rows_per_step):
                rows = {key: value[start : start + rows_per_step] for key, value in data.items()}
                metrics.append(self.train_step(self._micro_batches(rows), iteration))
        return metrics

    def _micro_batches(self, rows: Batch) -> list[Batch]:
        """Cut this rank's rows of one optimizer step."""
        groups = self.engine.batching.group_rows(
            rows, self.runtime_args.train_micro_batch_size, is_optimizer_step=True
        )
        return [take(rows, group) for group in groups]

    def compute_logprobs(self, data: Batch) -> torch.Tensor:
        """Log-probabilities of the batch's tokens under softmax(logits / temperature).

        Args:
            data: needs `all_tokens` [B, S]; `loss_mask` [B, S] saves work and zeroes the rest.

        Returns:
            [B, S-1] float32 on the CPU of every rank, entry t for token t+1; 0.0 where
            `loss_mask[:, 1:]` is 0.
        """
        return self._score_rows(data, _masked_logprobs, data["all_tokens"].size(1) - 1)

    def _score_rows(self, data: Batch, score_fn: ScoreFn, width: int) -> torch.Tensor:
        """Run the model on all rows: what `score_fn` returns, [b, up to width] -> [B, width]."""
        inputs = {key: data[key] for key in ("all_tokens", "loss_mask") if key in data}
        groups = self.engine.batching.group_rows(
            inputs, self._rows_per_forward(), is_optimizer_step=False
        )
        scores = self.engine.forward_only([take(inputs, rows) for rows in groups], score_fn)
        return put_back(scores, groups, width)

    def onload(self, weights: bool = True, optimizer: bool = True, grads: bool = True) -> None:
        """Take back what `offload` gave away, or the named parts of it."""
        self.engine.onload(weights=weights, optimizer=optimizer, grads=grads)

    def offload(self, weights: bool = True, optimizer: bool = True, grads: bool = True) -> None:
        """Give device memory back: of the named parts those that the yaml allows.

        `offload_weights`, `offload_optimizer_states` and `free_grad_buffers` allow them,
        `free_memory` all three.
        """
        self.engine.offload(
            weights=weights and self.module_args.offload_weights,
            optimizer=optimizer and self.module_args.offload_optimizer_states,
            grads=grads and self.module_args.free_grad_buffers,
        )

    # ---------------------------------------------------------------- weights and checkpoints

    def local_parameters(self) -> dict[str, torch.Tensor]:
        """This rank's live parameters by megatron-core's names, layers over the whole model."""
        return {name: parameter.data for name, parameter in self.engine.parameters.named()}

    def weight_gpu(self) -> tuple[str | None, frozenset[str]]:
        """UUID of the GPU that holds this rank's weights, and of those that it can read."""
        return gpu_and_peers(self.engine.device)

    def weight_shards(self) -> ShardedModel:
        """Where the whole model lies on the training ranks."""
        return self.engine.parameters.shards()

    def plan_weight_sync(
        self,
        sources: ShardedModel,
        targets: ShardedModel,
        links: Links,
        target_dtypes: dict[str, torch.dtype],
    ) -> dict[int, str]:
        """Plan what rollout ranks read from this rank; see WeightSender.plan.

        Raises:
            ValueError: this rank's parameters are not those that `sources` says.
        """
        self.engine.parameters.check_layouts(sources.rank_layouts(self.rank))
        # Walking the modules takes longer than a small copy; `.data` is looked up in every sync.
        self._synced_parameters = dict(self.engine.parameters.named())
        self._sender = WeightSender(self.rank, self._synced_tensors, self.engine.weights_generation)
        return self._sender.plan(sources, targets, links, target_dtypes)

    def listen_for_weight_links(self) -> int:
        """Listen for rollout ranks that cannot read this rank's memory; the port."""
        return self._sender.listen()

    def connect_weight_links(self, addresses: list[LinkAddress]) -> None:
        """Take the links to rollout ranks that cannot read this rank's memory, in order."""
        timeout_s = 60.0 * self.model_args.distributed_timeout_minutes
        self._sender.connect(
            open_links(addresses, is_sender=True, device=self.engine.device, timeout_s=timeout_s)
        )

    def export_weights(self) -> Export:
        """Show this rank's weights to rollout ranks on the same host, to be read there.

        They must not be trained, offloaded or onloaded until those ranks have read them.
        """
        self.engine.require_weights()
        return self._sender.export()

    def send_weights(self) -> None:
        """Send to the rollout ranks of `connect_weight_links`, which receive at the same time."""
        self.engine.require_weights()
        self._sender.send()

    def sent_weights(self, sample: Sample | None) -> Sent:
        """Say what each rollout rank should have; see WeightSender.sent."""
        self.engine.require_weights()
        return self._sender.sent(sample)

    def _synced_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {name: param.data for name, param in self._synced_parameters.items()}
        if self.model_args.lora_r:
            for name, matrices in self.engine.parameters.adapters().items():
                tensors |= zip(adapter_names(name), matrices, strict=True)
        return tensors

    def save_checkpoint(self, iteration: int) -> None:
        """Save weights, optimizer, schedule and random states for a later resume.

        With `runtime.async_save` it is there after `finish_checkpoint` only.
        """
        self.engine.save_checkpoint(
            self.checkpoint_dir, iteration, in_background=self.runtime_args.async_save
        )

    def is_checkpoint_written(self) -> bool:
        """Whether `finish_checkpoint` will not have to wait for this rank."""
        return self.engine.is_checkpoint_written

    def finish_checkpoint(self) -> None:
        """Wait until what `save_checkpoint` writes in the background is there, if there is any."""
        self.engine.finish_checkpoint()

    def load_checkpoint(self, iteration: int | None = None) -> int | None:
        """Load what `save_checkpoint` saved, the newest by default; any parallel sizes.

        Returns:
            Its iteration; None if there is none yet.
        """
        return self.engine.load_checkpoint(self.checkpoint_dir, iteration)

    def prune_checkpoints(self, keep: int, newest: int, protected: Sequence[int]) -> list[int]:
        """Remove this role's checkpoints but the `keep` last ones up to `newest`, and `protected`.

        Called after `newest` is complete.

        Returns:
            On rank 0 the iterations that were removed.
        """
        if self.rank != 0:
            return []
        return prune(self.checkpoint_dir, keep=keep, newest=newest, protected=protected)

    def save_hf(self, directory: str | Path) -> None:
        """Write weights, config.json and tokenizer in Hugging Face form."""
        self.engine.save_hf(directory)

    @property
    def checkpoint_dir(self) -> Path:
        """Where checkpoints of this role go."""
        if self.model_args.save:
            return Path(self.model_args.save)
        return self.runtime_args.run_dir / "checkpoints" / self.name

    @property
    def data_parallel_rank(self) -> int:
        """Which shard of a training batch this rank works on."""
        return self.engine.data_parallel_rank

    @property
    def data_parallel_size(self) -> int:
        """Number of shards of a training batch."""
        return self.engine.data_parallel_size

    def shutdown(self) -> None:
        """Dissolve the parallel groups."""
        self.engine.shutdown()

    # ---------------------------------------------------------------- helpers

    def _engine_args(self) -> ModelArgs:
        """The model's settings with what only the whole job knows filled in."""
        known = {
            "tensor_model_parallel_size": self.module_args.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.module_args.pipeline_model_parallel_size,
        }
        if self.model_args.lr_decay_iters is None:
            runtime = self.runtime_args.model_copy(
                update={"train_global_batch_size": self._global_batch_size()}
            )
            known["lr_decay_iters"] = num_optimizer_steps(runtime, runtime.sample_per_episode)
        dtype = self.model_args.dtype
        if not torch.cuda.is_available() and dtype not in ("auto", "float32"):
            # As the rollout engine does, so that both sides compute with the same numbers.
            known["dtype"] = "float32"
            if self.rank == 0 and self.replica_id == 0:
                logger.info("%s: dtype: %s becomes float32 (CPU)", self.name, dtype)
        return self.model_args.model_copy(update=known)

    def _global_batch_size(self) -> int:
        runtime = self.runtime_args
        if runtime.train_global_batch_size is not None:
            return runtime.train_global_batch_size
        return runtime.train_micro_batch_size * self.module_args.data_parallel_size

    def memory_keys(self) -> list[str]:
        """See BaseModule."""
        args, is_trained = self.model_args, self.module_args.trainable
        tokens = args.max_tokens_per_micro_batch
        least = 2 * args.seq_length  # of pairs; a row of its own needs half of it
        rows = self.runtime_args.train_micro_batch_size if is_trained else self._rows_per_forward()
        keys = []
        if tokens is not None and tokens > least:
            new = max(tokens // 2, least)
            keys.append(f"model_args.max_tokens_per_micro_batch: {tokens} -> {new}")
        elif tokens is None and rows > 1:
            keys.append(
                f"model_args.max_tokens_per_micro_batch: {least}  (in place of {rows} rows at once)"
            )
        if is_trained and args.recompute_granularity != "full":
            keys.append(
                "model_args.recompute_granularity: full, with recompute_method: uniform and "
                "recompute_num_layers: 1  (less activations, about a third more time)"
            )
        keys.append(
            f"tensor_model_parallel_size: {self.module_args.tensor_model_parallel_size} -> "
            f"{2 * self.module_args.tensor_model_parallel_size}, over more devices"
        )
        return keys

    def _rows_per_forward(self) -> int:
        own = self.module_args.generation_batch_size
        return own if own is not None and own > 0 else self.runtime_args.generation_batch_size

    def _check_equal_rows(self, num_rows: int) -> None:
        (total,) = self.engine.all_reduce_data_parallel([float(num_rows)])
        if total != num_rows * self.data_parallel_size:
            raise ValueError(
                f"train(): data parallel rank {self.data_parallel_rank} has {num_rows} rows, all "
                f"{self.data_parallel_size} ranks together {total:.0f}; each needs equally many"
            )

    def _compare_with_rollout(self, data: Batch, episode: int) -> dict[str, float]:
        mask = data["loss_mask"][:, 1:]
        self._check_finite(data, mask, episode)
        if "weight_version" in data:  # tokens of earlier weights differ for a good reason
            versions = data.get("token_versions", data["weight_version"][:, None])
            (newest,) = self.engine.all_reduce_data_parallel(
                [float(data["weight_version"].max())], dist.ReduceOp.MAX
            )
            mask = mask * (versions == newest)
        sums, largest = mismatch_sums(
            data["logprobs"], data["old_logprobs"], mask, cliprange=self.model_args.cliprange
        )
        totals = self.engine.all_reduce_data_parallel(sums.tolist())
        (maximum,) = self.engine.all_reduce_data_parallel([float(largest)], dist.ReduceOp.MAX)
        metrics = mismatch_metrics(totals, maximum)
        for warning in self._mismatch_guard.warnings(metrics, episode, _weight_version(data)):
            if self.rank == 0:
                logger.warning("%s: %s", self.name, warning)
        return metrics

    def _check_finite(self, data: Batch, mask: torch.Tensor, episode: int) -> None:
        """Raise, on all ranks alike, if a response token of any of them has no finite value."""
        rollout = count_not_finite(data["logprobs"], mask)
        trainer = count_not_finite(data["old_logprobs"], mask)
        of_rollout, of_trainer = self.engine.all_reduce_data_parallel(
            [float(rollout.sum()), float(trainer.sum())]
        )
        if of_rollout + of_trainer == 0:
            return
        num_rows = batch_size(data)
        own = (rollout + trainer).nonzero().flatten() + self.data_parallel_rank * num_rows
        own_first = float(own[0]) if len(own) else float("inf")
        (first,) = self.engine.all_reduce_data_parallel([own_first], dist.ReduceOp.MIN)
        rank, row = divmod(int(first), num_rows)
        raise MismatchError(
            f"episode {episode}, rollouts of weight version {_weight_version(data)}: "
            f"log-probabilities of response tokens are NaN or infinite ({of_rollout:.0f} of the "
            f"rollout's, {of_trainer:.0f} of the trainer's), first in row {row} of data parallel "
            f"rank {rank}. No optimizer step was made"
        )


def num_optimizer_steps(runtime: RuntimeConfig, rows_per_episode: int) -> int:
    """Updates of a model over the whole job.

    Args:
        runtime: the job's, with its train_global_batch_size.
        rows_per_episode: that an episode gives to train on, without those of earlier ones.
    """
    num_rows = (
        rows_per_episode
        * num_episodes_kept(episode, runtime.max_relay_episode, runtime.relay_episode_offset)
        for episode in range(1, runtime.num_episode + 1)
    )
    return runtime.num_training_epoch * sum(
        -(-rows // runtime.train_global_batch_size) for rows in num_rows
    )


def _weight_version(data: Batch) -> int | None:
    return int(data["weight_version"][0]) if "weight_version" in data else None


def _masked_logprobs(batch: Batch, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    if "loss_mask" not in batch:
        return logprobs
    return logprobs * (batch["loss_mask"][:, 1:] != 0)
