"""The policy that learns from pairs of its responses, with megatron-core."""

from typing import Any

from chatlearn_vllm import PreferenceModule


class OnlineDPOTrainer(PreferenceModule):
    """The loss of DPO or IPO, as `use_ipo` of its yaml says."""

    def model_provider(self, *args: Any, **kwargs: Any) -> Any:
        """Build the model that config.json in `load` describes."""
        return super().model_provider(*args, **kwargs)
