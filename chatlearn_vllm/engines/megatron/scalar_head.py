"""What takes the place of the vocabulary projection in a value model or a reward model?"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from chatlearn_vllm.engines.megatron.model import ModelProvider
from chatlearn_vllm.engines.megatron.padding import pad_token_id

_HF_CLASSES = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "mixtral": "MixtralForSequenceClassification",
    "qwen3_moe": "Qwen3MoeForSequenceClassification",
}
"""By model_type: the class of transformers that has this head under the name `score`."""


class ScalarHead(torch.nn.Module):
    """One number per token: hidden states times a weight [1, hidden], in float32, without bias.

    Called as GPTModel calls its output layer. Every tensor parallel rank holds the whole weight.
    Under sequence parallelism each computes the numbers of its part of the sequence, and these are
    gathered: `hidden` times fewer than if the hidden states were. Starts from zeros, as in OpenAI's
    code for value models (S. Huang et al. 2023, "The N Implementation Details of RLHF with PPO",
    https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo).
    """

    def __init__(self, config: TransformerConfig) -> None:
        """Make the weight on the CPU, in the dtype of the model."""
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        weight = torch.zeros(1, config.hidden_size, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        # Its gradient on a rank is then that of a part of the sequence: `finalize_model_grads` adds
        # these up for parameters with this mark.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        """[s, b, hidden], [s / tp, b, hidden] if sequence parallel -> float32 [s, b, 1].

        Args:
            hidden: after the final norm.
            weight: must be None: there is none to share.
            runtime_gather_output: not used, the result is whole on every rank.
        """
        assert weight is None, "a scalar head has a weight of its own"
        values = F.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            # All ranks go on with the same numbers and so get the same gradient, not parts of it.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


def with_scalar_head(provider: ModelProvider) -> ModelProvider:
    """Let a provider's last chunk end with a scalar head, whatever it ends with."""

    def build(*args: Any, **kwargs: Any) -> GPTModel:
        chunk = provider(*args, **kwargs)
        chunk.share_embeddings_and_output_weights = False
        if chunk.post_process:
            chunk.output_layer = ScalarHead(chunk.config)
        return chunk

    return build


def hf_config_with_scalar_head(
    hf_config: Mapping[str, Any], directories: Iterable[Path]
) -> dict[str, Any]:
    """The config.json that transformers' AutoModelForSequenceClassification wants.

    Its forward reads each row at the last token that is not `pad_token_id`. A reward model learns
    its score at the last response token, mostly an end-of-sequence token, so that one must not be
    the padding: the score would be read one token too early. See `padding.pad_token_id` for what
    is taken instead. Rows have to be padded with that token, as the tokenizer that is saved beside
    the model does. Where there is no such token config.json names none: transformers then reads a
    row at its end, and refuses batches of several.

    Args:
        hf_config: of either kind of model.
        directories: where tokenizer files may be; the last one that has some is taken.
    """
    return {
        **hf_config,
        "architectures": [_HF_CLASSES[hf_config["model_type"]]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_token_id(hf_config, directories),
    }
