"""What does a user subclass to train a policy on pairs of responses (DPO, IPO)?"""

from __future__ import annotations

import torch

from chatlearn_vllm.algorithms.preference import preference_loss, sequence_logprobs
from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.engines.megatron.micro_batches import take
from chatlearn_vllm.modules.megatron_module import MegatronModule
from chatlearn_vllm.modules.pairs import check_room_for_pairs, is_pair


class PreferenceModule(MegatronModule):
    """A trained policy whose rows come in pairs: chosen, rejected, chosen, rejected, ...

    Rows need `ref_logprobs`. The keys `dpo_weight`, `use_ipo` and `label_smoothing` of the model's
    yaml say which loss; `train_micro_batch_size` counts rows, two per pair.
    """

    def init(self) -> None:
        """Join the process group and the parallel groups. All ranks; once.

        Raises:
            ValueError: a micro-batch has no room for a pair, or an optimizer step would part one.
        """
        check_room_for_pairs(self)
        rows, unit = self._global_batch_size(), 2 * self.module_args.data_parallel_size
        if rows % unit:
            raise ValueError(
                f"runtime.train_global_batch_size={rows} must be a multiple of {unit} = 2 x data "
                f"parallel size of models.{self.name}: rows are trained in pairs"
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
        self._check_equal_rows(batch_size(data))
        return self._train_epochs(data, iteration)

    def _micro_batches(self, rows: Batch) -> list[Batch]:
        groups = self.engine.batching.group_rows(
            rows,
            max(1, self.runtime_args.train_micro_batch_size // 2),
            is_optimizer_step=True,
            together=2,
        )
        return [take(rows, group, together=2) for group in groups]

    def train_step(self, data: list[Batch], iteration: int) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches of whole pairs.

        The loss is the mean over the pairs of the global batch. A filler without any token in
        `loss_mask` counts nowhere.
        """
        own = sum(int(is_pair(batch).sum()) for batch in data)
        (num_pairs,) = self.engine.all_reduce_data_parallel([float(own)])
        args = self.model_args

        def loss_fn(
            batch: Batch, logprobs: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            mask = batch["loss_mask"][:, 1:]
            counts = is_pair(batch)
            ours = sequence_logprobs(logprobs, mask)
            theirs = sequence_logprobs(batch["ref_logprobs"], mask)
            loss, sums = preference_loss(
                ours[0::2][counts],
                ours[1::2][counts],
                theirs[0::2][counts],
                theirs[1::2][counts],
                beta=args.dpo_weight,
                kind="ipo" if args.use_ipo else "dpo",
                label_smoothing=args.label_smoothing,
            )
            return loss.sum() / max(1.0, num_pairs), sums

        metrics, sums = self.engine.train_step(data, loss_fn)
        pairs = sums.pop("pairs")
        means = {name: value / max(1.0, pairs) for name, value in sums.items()}
        return {**means, **metrics, "pairs": pairs}
