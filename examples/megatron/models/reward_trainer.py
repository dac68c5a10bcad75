"""A reward model that learns from pairs of responses, with megatron-core."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from chatlearn_vllm import RewardModule
from chatlearn_vllm.data.prompts import keep_tail, prompt_token_ids
from chatlearn_vllm.data.responses import require_eos, response_rows


class RewardTrainer(RewardModule):
    """Bradley-Terry loss on (prompt, chosen, rejected) records; saves Hugging Face form."""

    def setup(self) -> None:
        """Load the tokenizer."""
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_args.tokenizer)
        require_eos(self.tokenizer, self.model_args.tokenizer)

    def train_records(self, records: list[dict[str, str]], iteration: int) -> list[dict]:
        """Tokenize pairs and learn them; one dict of metrics per optimizer step."""
        sides = {side: self.encode(records, side) for side in ("chosen", "rejected")}
        rows = {
            f"{side}_{key}": value for side, batch in sides.items() for key, value in batch.items()
        }
        return self.train(rows, iteration)

    def compare(self, data: dict[str, Any], iteration: int) -> dict[str, torch.Tensor]:
        """Rewards [B] of both responses of the B `pairs` in `data`."""
        return {
            f"{side}_rewards": self.forward_step(self.encode(data["pairs"], side))["rewards"]
            for side in ("chosen", "rejected")
        }

    def encode(self, records: Sequence[dict[str, str]], side: str) -> dict[str, torch.Tensor]:
        """The rows of one response of each pair, as a rollout of the policy would be.

        A complete response ends with EOS. A prompt of more than seq_length - max_new_tokens tokens
        loses its head, a response of more than max_new_tokens its end.
        """
        args, tokenizer = self.model_args, self.tokenizer
        room = args.seq_length - args.max_new_tokens
        prompts, responses = [], []
        for record in records:
            prompt = prompt_token_ids(record["prompt"], tokenizer)
            response = tokenizer.encode(record[side], add_special_tokens=False)
            prompts.append(keep_tail(prompt, room, tokenizer.bos_token_id))
            responses.append([*response, tokenizer.eos_token_id][: args.max_new_tokens])
        return response_rows(
            prompts, responses, seq_length=args.seq_length, pad_id=tokenizer.eos_token_id
        )

    def save_checkpoint(self, iteration: int) -> None:
        """Write a checkpoint for resuming, and in `save`/hf the model that other jobs load."""
        super().save_checkpoint(iteration)
        self.save_hf(self.checkpoint_dir / "hf")
