"""Which RMSNorm works under sequence parallelism without Transformer Engine or apex?"""

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that its gradient is summed over the tensor parallel ranks.

    megatron-core's own WrappedTorchNorm refuses sequence parallelism. All it lacks is this mark:
    `finalize_model_grads` all-reduces the gradients of parameters that carry it.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: object
    ) -> None:
        """Signature of a norm in a megatron-core layer spec."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
