"""How does a reward model of Hugging Face transformers score responses?"""

from __future__ import annotations

import os
from typing import Any

import torch

from chatlearn_vllm.config.model_files import longest_sequence
from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.data.prompts import keep_tail
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.observability.logging import get_logger

logger = get_logger(__name__)


class HFRewardModule(BaseModule):
    """Any model that `AutoModelForSequenceClassification` loads with one label, as it is.

    `load` names its directory, `tokenizer` another one for the tokenizer, `dtype` its numbers.
    Every replica holds the whole model on one device (or, with num_cpu, on the CPU) and scores a
    share of the responses, `generation_batch_size` at a time. Texts that are longer than the model
    reads (its positions, the tokenizer's limit, `seq_length` if that is given) lose their
    beginnings. Override `texts` to put prompt and response together in another way: a model that
    was trained on chats wants its own template, and the end of a turn behind the response.
    """

    def texts(self, data: Batch) -> list[str]:
        """What the model reads of every row: the prompt's text, and the response's behind it."""
        pairs = zip(data["str_prompts"], data["str_outputs"], strict=True)
        return [prompt + response for prompt, response in pairs]

    def model_setup(self) -> None:
        """Load model and tokenizer.

        Raises:
            ValueError: a key is missing or does not fit, or the model has more than one label, or
                no weights of its last layer.
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
        trusts = {"trust_remote_code": bool(args.get("trust_remote_code", False))}
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.load, **trusts)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            args.load,
            dtype=dtype if args.dtype == "auto" else getattr(torch, args.dtype),
            output_loading_info=True,
            **trusts,
        )
        if model.config.num_labels != 1:
            raise ValueError(
                f"models.{self.name}: {args.load}: has {model.config.num_labels} labels; a reward "
                "model has one (num_labels in its config.json)"
            )
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"models.{self.name}: {args.load}: has no weights of {', '.join(missing)}, which "
                "would be random, and rewards with them; load a model that was trained to score"
            )
        _score_in_float32(model)
        self.model = model.to(self.device).eval()
        self._has_told_of_cuts = False
        self.setup()

    @torch.inference_mode()
    def forward_step(self, data: Batch, iteration: int = 0) -> dict[str, Any]:
        """`rewards` float32 [B], on the CPU."""
        encoded = self._token_ids(self.texts(data))
        rewards = torch.empty(batch_size(data))
        # Rows of similar lengths go together: less padding.
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        step = self._rows_per_forward()
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            inputs = self._padded([encoded[row] for row in rows])
            rewards[rows] = self.model(**inputs).logits[:, 0].float().cpu()
        return {"rewards": rewards}

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text; of one that is too long for the model the end, with the response."""
        args = self.model_args
        limits = [self.tokenizer.model_max_length, longest_sequence(self.model.config.to_dict())]
        limits += [args.seq_length] if "seq_length" in args.model_fields_set else []
        limit = min(one for one in limits if one is not None)
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        num_cut = sum(len(row) > limit for row in rows)
        if num_cut and not self._has_told_of_cuts:
            self._has_told_of_cuts = True
            logger.warning(
                "%s: %d of %d texts are longer than the %d tokens that the model reads and lost "
                "their beginnings", self.name, num_cut, len(rows), limit,
            )  # fmt: skip
        return [keep_tail(row, limit, self.tokenizer.bos_token_id) for row in rows]

    def _padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Inputs of the model, on its device: padded behind each row.

        A causal model gives its score at the last token that is not `pad_token_id`, whatever the
        mask says. So that is a token with which no row ends: the tokenizer's, if it is one.
        """
        config, last = self.model.config.get_text_config(), {row[-1] for row in rows if row}
        own = [self.tokenizer.pad_token_id, config.pad_token_id]
        pad = next(
            one for one in [*own, *range(len(last) + 1)] if one is not None and one not in last
        )
        config.pad_token_id = pad
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor(
                [row + [pad] * (width - len(row)) for row in rows], device=self.device
            ),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device
            ),
        }

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


def _score_in_float32(model: torch.nn.Module) -> None:
    """Have the last layer of a causal model compute in float32: bfloat16 rounds rewards to ties."""
    head = getattr(model, "score", None)
    if isinstance(head, torch.nn.Linear):
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
