"""What does a user subclass to train a policy on pairs of responses (DPO, IPO)?"""

from __future__ import annotations

import torch

from chatlearn_vllm.algorithms.preference import preference_loss, sequence_logprobs
from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.engines.megatron.micro_batches import equal_groups, take
from chatlearn_vllm.modules.megatron_module import MegatronModule


class PreferenceModule(MegatronModule):
    """A trained policy whose rows come in pairs: chosen, rejected, chosen, rejected, ...

    Rows need `ref_logprobs`. The keys `dpo_weight`, `use_ipo` and `label_smoothing` of the model's
    yaml say which loss; `train_micro_batch_size` counts rows, two per pair.
    """

    def init(self) -> None:
        """Join the process group and the parallel groups. All ranks; once.

        Raises:
            ValueError: a key of the yaml is not for pairs.
        """
        limit = self.model_args.max_tokens_per_micro_batch
        if limit is not None:
            raise ValueError(
                f"models.{self.name}: max_tokens_per_micro_batch={limit} would part the two rows "
                "of a pair; leave it out and set runtime.train_micro_batch_size"
            )
        super().init()

    def train(self, data: Batch, iteration: int = 0) -> list[dict[str, float]]:
        """Train on one episode's pairs, `num_training_epoch` times.

        Args:
            data: this data parallel rank's rows, equally many on each, pairs adjacent.
            iteration: number of the episode.

        Returns:
            Metrics of each optimizer step, the same on all ranks; none without rows.
        """
        num_rows = batch_size(data)
        if not num_rows:
            return []
        rows_per_step = self.runtime_args.train_global_batch_size // self.data_parallel_size
        pairs_per_micro_batch = max(1, self.runtime_args.train_micro_batch_size // 2)
        metrics = []
        for _ in range(self.runtime_args.num_training_epoch):
            for start in range(0, num_rows, rows_per_step):
                step = range(start, min(start + rows_per_step, num_rows))
                groups = equal_groups(
                    len(step) // 2,
                    pairs_per_micro_batch,
                    multiple_of=self.engine.micro_batch_multiple,
                )
                micro_batches = [
                    take(data, [step[0] + 2 * pair + side for pair in pairs for side in (0, 1)])
                    for pairs in groups
                ]
                metrics.append(self.train_step(micro_batches, iteration))
        return metrics

    def train_step(self, data: list[Batch], iteration: int) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches of whole pairs."""
        (num_pairs,) = self.engine.all_reduce_data_parallel([sum(map(batch_size, data)) / 2])
        args = self.model_args

        def loss_fn(
            batch: Batch, logprobs: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            mask = batch["loss_mask"][:, 1:]
            ours = sequence_logprobs(logprobs, mask)
            theirs = sequence_logprobs(batch["ref_logprobs"], mask)
            loss, sums = preference_loss(
                ours[0::2],
                ours[1::2],
                theirs[0::2],
                theirs[1::2],
                beta=args.dpo_weight,
                kind="ipo" if args.use_ipo else "dpo",
                label_smoothing=args.label_smoothing,
            )
            return loss.sum() / num_pairs, sums

        metrics, sums = self.engine.train_step(data, loss_fn)
        pairs = sums.pop("pairs")
        return {**{name: value / pairs for name, value in sums.items()}, **metrics, "pairs": pairs}
