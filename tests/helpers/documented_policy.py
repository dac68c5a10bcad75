"""The policy of the documentation page, and how it can misbehave."""

import copy

from chatlearn_vllm import VLLMModule
from chatlearn_vllm.data.prompts import PromptPipeline
from chatlearn_vllm.utils.vllm_utils import get_model, print_rank_0


class VLLMPromptPipeline(PromptPipeline):
    """As printed on the documentation page, character slicing included."""

    def __init__(self, prompts, max_prompt_length, tokenizer=None):
        for p in prompts:
            assert len(p) > 0, "Got empty prompt"
        assert max_prompt_length > 0
        self.prompts = [(p, tokenizer.encode(p[:max_prompt_length])) for p in prompts]
        self.prompts_ids = []
        for prompt, prompt_ids in self.prompts:
            p = {"input_ids": prompt_ids, "prompt": prompt}
            self.prompts_ids.extend([copy.deepcopy(p)])
        self.tokenizer = tokenizer


class VLLMPolicyInference(VLLMModule):
    """The class of the documentation page, with what it leaves open filled by the defaults."""

    steps: list[tuple[int, int]]
    misbehave: str | None = None

    def setup(self):
        self.steps, self.eval_modes = [], []
        self.model = get_model(self.model_provider, self.model_args)
        print_rank_0("model is built")

    def model_provider(self):
        """Build the model."""
        return super().model_provider()

    def build_dataset(self, train_prompts, is_eval=False):
        max_prompt_length = self.model_args.get("seq_length") - self.model_args.get(
            "max_new_tokens"
        )
        return VLLMPromptPipeline(train_prompts, max_prompt_length, self.tokenizer.tokenizer)

    def eval_forward(self, data, iteration=0):
        return self._forward_step(data, iteration, eval_mode=True)

    def _add_request(self, data, is_eval=False):
        return self._add_request_internal(data["prompt"], data["input_ids"], is_eval=is_eval)

    def _forward_step(self, data, iteration, eval_mode):
        assert iteration >= 0
        assert isinstance(eval_mode, bool)
        seq_group_metadata_list = data["seq_group_metadata_list"]
        blocks_to_swap_in = data["blocks_to_swap_in"]
        blocks_to_swap_out = data["blocks_to_swap_out"]
        blocks_to_copy = data["blocks_to_copy"]
        self.steps.append((iteration, sum(g.token_chunk_size for g in seq_group_metadata_list)))
        self.eval_modes.append(eval_mode)
        if self.misbehave == "raise":
            raise KeyError("my own bug")
        if self.misbehave == "raise late":
            self.execute_step(data)
            raise KeyError("my own bug")
        if self.misbehave == "skip":
            return None
        outputs = self.execute_step(
            seq_group_metadata_list, blocks_to_swap_in, blocks_to_swap_out, blocks_to_copy
        )
        return None if self.misbehave == "drop" else outputs

    def forward_step(self, data, iteration=0):
        return self._forward_step(data, iteration, eval_mode=False)

    def decode_internal(self, batched_outputs):
        self.request_ids = [output.request_id for output in batched_outputs]
        batch = super().decode_internal(batched_outputs)
        if self.misbehave == "drop logprobs":
            del batch["logprobs"]
        return batch
