"""The policy that generates, with vLLM: every hook of VLLMModule, ready to be changed."""

from typing import Any

from chatlearn_vllm import VLLMModule, VLLMPromptPipeline


class VLLMPolicyInference(VLLMModule):
    """Answers prompts; see docs/vllm_module.md for what each hook may do."""

    def build_dataset(self, train_prompts: list[Any], is_eval: bool = False) -> VLLMPromptPipeline:
        """Tokenize prompts, leaving room for the response."""
        max_prompt_length = self.model_args["seq_length"] - self.model_args["max_new_tokens"]
        return VLLMPromptPipeline(
            train_prompts,
            max_prompt_length,
            self.tokenizer.tokenizer,
            self.model_args["prompt_key"],
        )

    def model_provider(self) -> Any:
        """Take vLLM's own model for the architecture in config.json."""
        return super().model_provider()

    def _add_request(self, data: dict[str, list], is_eval: bool = False) -> Any:
        return self._add_request_internal(data["prompt"], data["input_ids"], is_eval=is_eval)

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> Any:
        """Run what vLLM scheduled; the place to look at a step or to count it."""
        return self.execute_step(data)

    def decode_internal(self, batched_outputs: list[Any]) -> dict[str, Any]:
        """Make the batch that reward and trainer read."""
        return super().decode_internal(batched_outputs)
