"""What do a model's settings mean for megatron-core, and which contradict each other?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from chatlearn_vllm.config import ModelArgs
    from chatlearn_vllm.layouts import Head


def check_settings(args: ModelArgs, *, trainable: bool, head: Head) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: settings contradict each other, or the model's role.
    """
    if head == "scalar" and trainable and args.lora_r:
        raise ValueError(
            f"lora_r={args.lora_r} is not supported for a model with a scalar head: adapters "
            "leave all other weights as they are, and the head has to learn; set lora_r: 0"
        )
    if head == "lm" and args.temperature <= 0:
        raise ValueError(
            f"temperature={args.temperature} must be > 0 here: the model scores tokens under "
            "softmax(logits / temperature), as the rollout sampled them"
        )
    if args.overlap_param_gather and not args.overlap_grad_reduce:
        raise ValueError("overlap_param_gather=True needs overlap_grad_reduce=True")


def transformer_settings(args: ModelArgs) -> dict[str, Any]:
    """Keyword arguments for `TransformerConfig` that do not come from config.json."""
    dtype = resolve_dtype(args)
    settings: dict[str, Any] = dict(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=args.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=args.num_layers_in_last_pipeline_stage,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        sequence_parallel=args.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        recompute_granularity=args.recompute_granularity,
    )
    if args.recompute_granularity == "full":
        settings.update(
            recompute_method=args.recompute_method or "uniform",
            recompute_num_layers=args.recompute_num_layers or 1,
        )
    return {**settings, **args.transformer_args}


def resolve_dtype(args: ModelArgs) -> torch.dtype:
    """The dtype of weights and activations on this machine.

    Raises:
        ValueError: float16 on a CPU, where megatron-core's loss scaling does not run.
    """
    name = args.dtype
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    if name == "float16" and not torch.cuda.is_available():
        raise ValueError("dtype=float16 needs a GPU; use float32 or bfloat16 on a CPU")
    return getattr(torch, name)
