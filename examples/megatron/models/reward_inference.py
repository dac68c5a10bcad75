"""A reward model with a scalar head, with megatron-core."""

from chatlearn_vllm import RewardModule


class RewardInference(RewardModule):
    """Scores each response at its last token."""
