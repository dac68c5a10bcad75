"""Which part of the model does this rank hold, and how are its parameters called?"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from chatlearn_vllm.engines.megatron.architectures import rope_settings
from chatlearn_vllm.engines.megatron.attention import SDPACoreAttention
from chatlearn_vllm.engines.megatron.norm import RMSNorm


class ModelProvider(Protocol):
    """Builds one chunk of the model; what users may replace."""

    def __call__(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
    ) -> GPTModel:
        """Build the chunk with the embedding (pre_process) and the output layer (post_process)."""


def build_gpt_model(
    config: TransformerConfig,
    hf_config: Mapping[str, Any],
    *,
    share_embeddings_and_output_weights: bool,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build one chunk of a Llama-like model; its weights are not initialised.

    Logits are left cut over the tensor parallel ranks. The vocabulary is padded to a multiple of
    the tensor parallel size and no further; `logprobs.py` leaves the padding out.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        # megatron-core 0.16 asks for it and defines it with Transformer Engine only.
        moe_utils.te_general_gemm = None
    tp_size = config.tensor_model_parallel_size
    return GPTModel(
        config,
        _block_spec(config, vp_stage),
        vocab_size=-(-hf_config["vocab_size"] // tp_size) * tp_size,
        max_sequence_length=hf_config.get("max_position_embeddings", 2048),
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=share_embeddings_and_output_weights,
        vp_stage=vp_stage,
        **rope_settings(hf_config),
    )


def _block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """megatron-core's layers of this chunk, dense or with experts, with our norm and attention."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    for spec in block.layer_specs:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = SDPACoreAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(block.layer_specs, layer_norm=RMSNorm)


def build_chunks(
    config: TransformerConfig, provider: ModelProvider, device: torch.device
) -> list[GPTModel]:
    """Build every chunk of this pipeline stage: one, or one per virtual stage.

    Collective over the pipeline parallel group where embeddings are tied.
    """
    num_virtual = config.virtual_pipeline_model_parallel_size
    if not num_virtual:
        chunk = provider(
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        return [_mark_experts(chunk.to(device))]
    return [
        _mark_experts(
            provider(
                pre_process=parallel_state.is_pipeline_first_stage(
                    ignore_virtual=False, vp_stage=stage
                ),
                post_process=parallel_state.is_pipeline_last_stage(
                    ignore_virtual=False, vp_stage=stage
                ),
                vp_stage=stage,
            ).to(device)
        )
        for stage in range(num_virtual)
    ]


def _mark_experts(chunk: GPTModel) -> GPTModel:
    """Let the gradients of experts be reduced over the ranks that hold the same experts.

    megatron-core sets this mark only where expert_model_parallel_size > 1. Elsewhere it takes
    experts for dense parameters, which is wrong where expert_tensor_parallel_size differs from
    tensor_model_parallel_size: the gradients of copies would not be added up, without an error.
    Marking them always also gives every model with experts one optimizer for them, so that a
    checkpoint can be resumed with another expert parallel size.
    """
    for name, parameter in chunk.named_parameters():
        if is_expert(name):
            parameter.allreduce = False
    return chunk


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to an expert; routers do not."""
    return ".mlp.experts." in name


def in_training_dtype(config: TransformerConfig, chunk: GPTModel) -> torch.nn.Module:
    """The chunk itself in float32, else wrapped and converted (in place) to bf16 or fp16."""
    return Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk


def named_parameters(chunks: list[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters, their layers numbered over the whole model.

    Names are those of the bare GPTModel, `decoder.layers.<global number>.…`.
    """
    for chunk in chunks:
        rename = _global_renamer(chunk)
        for name, parameter in chunk.named_parameters():
            yield rename(name), parameter


def named_modules(chunks: list[GPTModel]) -> Iterator[tuple[str, torch.nn.Module]]:
    """This rank's modules under the names that those of their parameters begin with."""
    for chunk in chunks:
        rename = _global_renamer(chunk)
        for name, module in chunk.named_modules():
            yield rename(name), module


def _global_renamer(chunk: GPTModel) -> Callable[[str], str]:
    offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0

    def rename(name: str) -> str:
        prefix = "decoder.layers."
        if not name.startswith(prefix):
            return name
        number, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(number) + offset}{dot}{rest}"

    return rename
