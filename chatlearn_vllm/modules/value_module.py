"""What does a user subclass to predict returns, or to learn that, on megatron-core?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from chatlearn_vllm.algorithms.value import explained_variance
from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.modules.weight_target import WeightTargetModule

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from chatlearn_vllm.layouts import Head

_NEEDED_TO_TRAIN = ("all_tokens", "loss_mask", "returns", "values")


class ValueModule(WeightTargetModule):
    """A value model (critic): one number per token, what the rewards to come should sum to.

    `load` names a *ForSequenceClassification model with one label, or a causal language model: its
    head then starts from zeros. Usable as it is to score; to train, implement `loss`, or for full
    control `train_step`.
    """

    head: ClassVar[Head] = "scalar"

    def model_provider(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ) -> GPTModel:
        """See `MegatronModule`; a scalar head takes the place of the output layer."""
        return super().model_provider(pre_process, post_process, vp_stage)

    def loss(
        self, batch: Batch, values: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss of every token of one micro-batch; see `MegatronModule.loss`.

        Args:
            batch: `returns` and `values` [b, S'-1] are there: the targets, and what was predicted
                before the first update.
            values: [b, S'-1] under the weights being trained, differentiable.

        Returns:
            The loss [b, S'-1], and sums over the marked tokens.
        """
        raise NotImplementedError(
            f"models.{self.name}: {type(self).__name__} is trained (trainable: True): implement "
            "loss() or train_step(), for example around algorithms.value.value_loss"
        )

    def train_step(self, data: list[Batch], iteration: int) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches; see `MegatronModule.train_step`.

        Returns:
            Also `explained_variance`, if `loss` gives the sums of `algorithms.value.value_loss`.
        """
        metrics = self._step_on_tokens(data, lambda batch, values: self.loss(batch, values[:, :-1]))
        if "returns_squared" in metrics:
            means = {**metrics, "tokens": 1.0}
            metrics["explained_variance"] = explained_variance(means)
        return metrics

    def forward_step(self, data: Batch, iteration: int = 0) -> dict[str, Any]:
        """Score a batch.

        Returns:
            `values` as `compute_values` returns them.
        """
        self.require_ready()
        return {"values": self.compute_values(data)}

    def train(self, data: Batch, iteration: int = 0) -> list[dict[str, float]]:
        """Train on one episode's samples, `num_training_epoch` times; see `MegatronModule.train`.

        Args:
            data: this data parallel rank's rows, equally many on each; needs `all_tokens` and
                `loss_mask` [B, S], `returns` and `values` [B, S-1].
            iteration: number of the episode.

        Returns:
            Metrics of each optimizer step, the same on all ranks.

        Raises:
            ValueError: a key is missing.
        """
        missing = [key for key in _NEEDED_TO_TRAIN if key not in data]
        if missing:
            raise ValueError(
                f"models.{self.name}: train() needs {', '.join(_NEEDED_TO_TRAIN)} and got "
                f"{', '.join(data)}; add {', '.join(missing)}"
            )
        self._check_equal_rows(batch_size(data))
        return self._train_epochs(data, iteration)

    def compute_values(self, data: Batch) -> torch.Tensor:
        """What the model predicts before each token is sampled.

        Args:
            data: needs `all_tokens` [B, S]; `loss_mask` [B, S] saves work and zeroes the rest.

        Returns:
            [B, S-1] float32 on the CPU of every rank, aligned with `logprobs`: entry t is computed
            from the tokens up to t and is the value of the state in which token t+1 is sampled. 0.0
            where `loss_mask[:, 1:]` is 0.
        """
        return self._score_rows(data, _masked_values, data["all_tokens"].size(1) - 1)


def _masked_values(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    if "loss_mask" not in batch:
        return values[:, :-1]
    return values[:, :-1] * (batch["loss_mask"][:, 1:] != 0)
