"""A policy that learns given responses, with megatron-core."""

from typing import Any

import torch
from transformers import AutoTokenizer

from chatlearn_vllm import MegatronModule
from chatlearn_vllm.data.prompts import prompt_token_ids
from chatlearn_vllm.data.responses import require_eos, response_rows


class SFTTrainer(MegatronModule):
    """Next-token loss on the responses of (prompt, response) records; saves Hugging Face form."""

    def setup(self) -> None:
        """Load the tokenizer."""
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_args.tokenizer)
        require_eos(self.tokenizer, self.model_args.tokenizer)

    def model_provider(self, *args: Any, **kwargs: Any) -> Any:
        """Build the model that config.json in `load` describes."""
        return super().model_provider(*args, **kwargs)

    def train_records(self, records: list[dict[str, Any]], iteration: int) -> list[dict]:
        """Tokenize records and learn them; one dict of metrics per optimizer step."""
        return self.train(self.encode(records), iteration)

    def encode(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch of prompt + response + EOS; the mask is on response and EOS.

        Raises:
            ValueError: a record has no response, or is longer than `seq_length`.
        """
        seq_length, eos = self.model_args.seq_length, self.tokenizer.eos_token_id
        prompts, responses = [], []
        for record in records:
            prompts.append(prompt_token_ids(record["prompt"], self.tokenizer))
            if not isinstance(record.get("response"), str):
                raise ValueError(f"record {record!r:.200} has no 'response', a text to be learned")
            response = self.tokenizer.encode(record["response"], add_special_tokens=False)
            responses.append([*response, eos])
            length = len(prompts[-1]) + len(responses[-1])
            if length > seq_length:
                raise ValueError(
                    f"record {record['prompt']!r} has {length} tokens, seq_length is {seq_length}"
                )
        return response_rows(prompts, responses, seq_length=seq_length, pad_id=eos)

    def loss(
        self, batch: dict[str, Any], logprobs: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Negative log-probability of each token."""
        return -logprobs, {}

    def save_checkpoint(self, iteration: int) -> None:
        """Write a checkpoint for resuming, and in `save`/hf the policy that other jobs load."""
        super().save_checkpoint(iteration)
        self.save_hf(self.checkpoint_dir / "hf")
