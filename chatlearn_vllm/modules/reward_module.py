"""What does a user subclass to score responses with a reward model, or to learn one from pairs?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.engines.megatron.micro_batches import take
from chatlearn_vllm.modules.megatron_module import MegatronModule
from chatlearn_vllm.modules.pairs import (
    CHOSEN,
    REJECTED,
    check_room_for_pairs,
    interleave_pairs,
    is_pair,
)

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from chatlearn_vllm.layouts import Head


class RewardModule(MegatronModule):
    """A reward model: one number per response, read at its last token.

    `load` names a *ForSequenceClassification model with one label. A model that is trained may also
    start from a causal language model; its head then starts from zeros.
    """

    head: ClassVar[Head] = "scalar"

    def model_provider(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ) -> GPTModel:
        """See `MegatronModule`; a scalar head takes the place of the output layer."""
        return super().model_provider(pre_process, post_process, vp_stage)

    def loss(
        self, batch: Batch, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss of every pair of one micro-batch; called on the last pipeline stage.

        Here -log sigmoid(r_chosen - r_rejected): R. A. Bradley and M. E. Terry 1952; L. Ouyang et
        al. 2022, "Training language models to follow instructions with human feedback",
        arXiv:2203.02155, equation 1.

        Args:
            batch: rows 2 i and 2 i + 1 are the chosen and the rejected response of pair i; keys as
                in `train`, without their beginnings.
            chosen: [p] rewards of the better responses, differentiable.
            rejected: [p] of the worse ones.

        Returns:
            The loss [p], and sums over the pairs (scalars), reported divided by the number of pairs
            of the global batch.
        """
        margin = (chosen - rejected).detach()
        return -F.logsigmoid(chosen - rejected), {
            "chosen_reward": chosen.detach().sum(),
            "rejected_reward": rejected.detach().sum(),
            "reward_margin": margin.sum(),
            "accuracy": (margin > 0).sum(),
        }

    def train_step(self, data: list[Batch], iteration: int) -> dict[str, float]:
        """One optimizer step on the pairs of this rank's micro-batches; see `MegatronModule`.

        The loss is the mean over the pairs of the global batch.

        Args:
            data: micro-batches as `loss` gets them, on the CPU.
            iteration: number of the episode.

        Returns:
            Metrics of the step, the same on all ranks.
        """
        own = sum(int(is_pair(batch).sum()) for batch in data)
        (num_pairs,) = self.engine.all_reduce_data_parallel([float(own)])

        def loss_fn(
            batch: Batch, values: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            rewards = at_last_token(values, batch["loss_mask"])
            pair_loss, sums = self.loss(batch, rewards[::2], rewards[1::2])
            return torch.where(is_pair(batch), pair_loss, 0.0).sum() / max(1.0, num_pairs), sums

        metrics, sums = self.engine.train_step(data, loss_fn)
        means = {name: value / max(1.0, num_pairs) for name, value in sums.items()}
        return {**means, **metrics, "pairs": num_pairs}

    def init(self) -> None:
        """Join the process group and the parallel groups. All ranks; once.

        Raises:
            ValueError: a micro-batch has no room for a pair.
        """
        if self.module_args.trainable:
            check_room_for_pairs(self)
        super().init()

    def model_setup(self) -> None:
        """Build the model, with its optimizer if it is trained. All ranks; once.

        Raises:
            ValueError: a frozen model has no head to score with.
        """
        super().model_setup()
        if self.engine.is_head_new and not self.module_args.trainable:
            raise ValueError(
                f"models.{self.name}: load={self.model_args.load!r} has no score.weight, so a "
                "model that is not trained would give every response the reward 0; load a "
                "*ForSequenceClassification model, or train one (trainable: True)"
            )

    def forward_step(self, data: Batch, iteration: int = 0) -> dict[str, Any]:
        """Score responses.

        Args:
            data: needs `all_tokens` and `loss_mask` [B, S].
            iteration: number of the episode.

        Returns:
            `rewards` [B], float32 on the CPU of every rank: what the model says at the last
            response token, the one that `loss_mask` marks last.

        Raises:
            ValueError: a row has no response token.
        """
        self._check_responses(data)
        rewards = self._score_rows(
            data,
            lambda batch, values: at_last_token(values, batch["loss_mask"]).unsqueeze(1),
            width=1,
        )
        return {"rewards": rewards.squeeze(1)}

    def train(self, data: Batch, iteration: int = 0) -> list[dict[str, float]]:
        """Learn from pairs of responses, `num_training_epoch` times.

        A row is a pair: each optimizer step takes the next train_global_batch_size /
        data_parallel_size pairs of every rank, and train_micro_batch_size counts pairs, too.

        Args:
            data: this data parallel rank's pairs, equally many on each: `chosen_all_tokens` and
                `chosen_loss_mask` [B, S], likewise `rejected_...`; more tensors of that kind reach
                `loss`.
            iteration: number of the episode.

        Returns:
            Metrics of each optimizer step, the same on all ranks.

        Raises:
            ValueError: a key is missing, or a row has no response token.
        """
        self._check_equal_rows(batch_size(data))
        for side in (CHOSEN, REJECTED):
            self._check_responses(data, side)
        return self._train_epochs(data, iteration)

    def _micro_batches(self, rows: Batch) -> list[Batch]:
        pairs = interleave_pairs(rows)
        groups = self.engine.batching.group_rows(
            pairs, self.runtime_args.train_micro_batch_size, is_optimizer_step=True, together=2
        )
        return [take(pairs, group, together=2) for group in groups]

    def _check_responses(self, data: Batch, side: str = "") -> None:
        needed = [side + key for key in ("all_tokens", "loss_mask")]
        missing = [key for key in needed if key not in data]
        if missing:
            raise ValueError(
                f"models.{self.name}: a reward model needs {' and '.join(needed)} and got "
                f"{', '.join(data)}; add {', '.join(missing)}"
            )
        empty = (data[needed[1]] == 0).all(1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"models.{self.name}: {needed[1]} is 0 on all tokens of rows {empty}, but a reward "
                "is read at the last response token; leave rows without a response out"
            )


def at_last_token(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The value of each row at the last token that its mask marks; 0.0 where it marks none.

    Args:
        values: [b, S].
        mask: [b, S], nonzero on tokens that count.

    Returns:
        [b], differentiable.
    """
    places = torch.arange(1, values.size(1) + 1, device=values.device)
    last = ((mask != 0) * places).amax(1)  # counted from 1
    found = values.gather(1, (last - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(last > 0, found, 0.0)
