"""How does a reward model of Hugging Face transformers score responses?"""

from __future__ import annotations

import os
from typing import Any

import torch

from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.modules.base import BaseModule


class HFRewardModule(BaseModule):
    """Any model that `AutoModelForSequenceClassification` loads with one label, as it is.

    `load` names its directory, `tokenizer` another one for the tokenizer, `dtype` its numbers.
    Every replica holds the whole model on one device (or, with num_cpu, on the CPU) and scores a
    share of the responses, `generation_batch_size` at a time. Override `texts` to put prompt and
    response together in another way.
    """

    def texts(self, data: Batch) -> list[str]:
        """What the model reads of every row: the prompt's text, and the response's behind it."""
        pairs = zip(data["str_prompts"], data["str_outputs"], strict=True)
        return [prompt + response for prompt, response in pairs]

    def model_setup(self) -> None:
        """Load model and tokenizer.

        Raises:
            ValueError: a key is missing or does not fit, or the model has more than one label.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        args = self.model_args
        if args.load is None:
            raise ValueError(f"models.{self.name}: load must name the reward model's directory")
        if self.world_size > 1:
            raise ValueError(
                f"models.{self.name}: a replica is one process here, but tensor and pipeline "
                f"parallel sizes make it {self.world_size}; set them to 1"
            )
        self.device = torch.device("cpu")
        if self.module_args.num_gpu and torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.load)
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        model = AutoModelForSequenceClassification.from_pretrained(args.load, dtype=dtype)
        if model.config.num_labels != 1:
            raise ValueError(
                f"models.{self.name}: {args.load}: has {model.config.num_labels} labels; a reward "
                "model has one (num_labels in its config.json)"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Sequence classification reads the score at the last token that is not padding.
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.padding_side = "right"
        self.model = model.to(self.device).eval()
        self.setup()

    @torch.inference_mode()
    def forward_step(self, data: Batch, iteration: int = 0) -> dict[str, Any]:
        """`rewards` float32 [B], on the CPU."""
        encoded = self.tokenizer(self.texts(data), truncation=True)["input_ids"]
        rewards = torch.empty(batch_size(data))
        # Rows of similar lengths go together: less padding.
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        step = self._rows_per_forward()
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            inputs = self.tokenizer.pad(
                {"input_ids": [encoded[row] for row in rows]}, return_tensors="pt"
            )
            rewards[rows] = self.model(**inputs.to(self.device)).logits[:, 0].float().cpu()
        return {"rewards": rewards}

    def onload(self) -> None:
        """Bring the model to its device."""
        self.model.to(self.device)

    def offload(self) -> None:
        """Move the model to host memory."""
        if self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def memory_keys(self) -> list[str]:
        """See BaseModule."""
        rows = self._rows_per_forward()
        return [f"generation_batch_size: {rows} -> {rows // 2}"] if rows > 1 else []

    def _rows_per_forward(self) -> int:
        own = self.module_args.generation_batch_size
        return own if own is not None and own > 0 else self.runtime_args.generation_batch_size
