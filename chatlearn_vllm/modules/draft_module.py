"""What trains, on megatron-core, the small model that drafts tokens for a policy?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.modules.megatron_module import MegatronModule

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_NEEDED_TO_TRAIN = ("all_tokens", "loss_mask", "logprobs")


class DraftModule(MegatronModule):
    """A draft that learns to say what the policy says, from the policy's own responses.

    Usable as it is: `DraftModule("draft_trainer")`, handed to an engine as `draft_trainer`. A
    subclass may replace `loss`. `temperature` of its yaml should be the policy's.
    """

    def model_provider(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ) -> GPTModel:
        """See `MegatronModule`; builds what config.json in `load` describes."""
        return super().model_provider(pre_process, post_process, vp_stage)

    def loss(
        self, batch: Batch, logprobs: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Negative log-probability of each token that the policy sampled.

        Its mean over samples of the policy p is, up to p's entropy, KL(p || draft): the forward KL
        on responses of the target model of Y. Zhou et al. 2024, "DistillSpec: Improving Speculative
        Decoding via Knowledge Distillation", arXiv:2310.08461, with the sampled token in place of
        the sum over the vocabulary. The smaller it is the more is accepted: of tokens drawn from
        the draft 1 - TV(p, draft) (Y. Leviathan et al. 2023, arXiv:2211.17192, corollary 3.6), and
        TV^2 <= KL / 2.

        Returns:
            The loss [b, S'-1]; the sum `kl` of the policy's log-probabilities less the draft's, an
            estimate of that KL where both are of the whole softmax at the same temperature.
        """
        mask = batch["loss_mask"][:, 1:]
        return -logprobs, {"kl": ((batch["logprobs"] - logprobs.detach()) * mask).sum()}

    def train(self, data: Batch, iteration: int = 0) -> list[dict[str, float]]:
        """Train on one episode's samples, `num_training_epoch` times; see `MegatronModule.train`.

        Nothing is compared with the rollout: its log-probabilities are another model's.

        Args:
            data: this data parallel rank's rows, equally many on each; needs `all_tokens` and
                `loss_mask` [B, S], `logprobs` [B, S-1].
            iteration: number of the episode.

        Returns:
            Metrics of each optimizer step, the same on all ranks; none without rows.

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
        return self._train_epochs({key: data[key] for key in _NEEDED_TO_TRAIN}, iteration)
