"""The frozen start of the policy, with megatron-core."""

from typing import Any

from chatlearn_vllm import MegatronModule


class PolicyReference(MegatronModule):
    """Scores responses for the KL penalty."""

    def model_provider(self, *args: Any, **kwargs: Any) -> Any:
        """Build the model that config.json in `load` describes."""
        return super().model_provider(*args, **kwargs)

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        """Log-probabilities [B, S-1] of the responses under the reference."""
        return {"ref_logprobs": self.compute_logprobs(data)}
