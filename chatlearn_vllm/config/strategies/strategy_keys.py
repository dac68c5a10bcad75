"""Which strategy may play a role, and which keys do its `strategy_args` hold?"""

from chatlearn_vllm.config.accepted_args import RetiredArgs
from chatlearn_vllm.config.strategies.keys import Becomes, Keys, NoEffect

STRATEGY: Keys = {
    "strategy_name": Becomes("", "vllm, hf_infer, megatron_train or megatron_infer"),
    "strategy_config": Becomes("model_args", "the engine's own arguments, see below"),
}
"""Keys of `strategy_args`."""

VLLM: Keys = {
    "tensor_parallel_size": Becomes("model_args.tensor_model_parallel_size"),
    "pipeline_parallel_size": Becomes("model_args.pipeline_model_parallel_size"),
    "max_model_len": Becomes(
        "model_args.max_model_len",
        "a number; default prompt_length + response_length, not what the model has, which would "
        "leave room for fewer sequences. Less than sequence_length: responses are as much shorter",
    ),
    "cuda_graph_sizes": NoEffect("vLLM calls it cudagraph_capture_sizes now"),
    "sleep_level": Becomes(
        "model_args.sleep_level", "1 (default): weights go to host memory; 2: they are dropped"
    ),
    "speculative_min_gain": Becomes(
        "model_args.speculative_min_gain",
        "with speculative_config: how many times as fast drafts must make generation; 0: they stay",
    ),
    "load_format": Becomes(
        "model_args.load_format", "default dummy (auto for a reward): weights come with the sync"
    ),
    "disable_mm_preprocessor_cache": NoEffect("prompts are text"),
    "data_parallel_size": NoEffect("replicas follow from device_mapping", (None, 1)),
    "distributed_executor_backend": NoEffect("each rank runs in a process of this job"),
    "enable_sleep_mode": NoEffect("it is always on, on GPUs", (None, True)),
    "VLLM_USE_V1": NoEffect("vLLM has the V1 engine only", (None, 1, "1", True)),
    **{name: NoEffect(RetiredArgs.no_effect) for name in RetiredArgs.model_fields},
}
"""Keys of the strategy_config of vllm, and of hf_infer in actor_infer, besides our own of engines;
for vllm also all fields of vLLM's EngineArgs."""

VLLM_SET_ELSEWHERE = {
    "model": "pretrain, or model_args.model_name_or_path",
    "dtype": "model_args.dtype",
    "seed": "seed at the top",
    "worker_extension_cls": "the runtime",
    "worker_cls": "the runtime",
    "enable_lora": "model_args.lora_target of actor_train, whose adapters are merged",
    "inference_engine": "strategy_name, vllm or hf_infer",
    "attn_implementation": "model_args.attn_implementation with hf_infer; vLLM chooses its own, or "
    "takes attention_backend",
}
"""Fields of EngineArgs that another key says."""

MEGATRON: Keys = {
    "additional_configs": Becomes("model_args", "further fields of TransformerConfig, as a map"),
    "recompute_modules": Becomes("model_args.recompute_modules", "a list, or text with commas"),
    "distrib_optim_fully_reshardable": NoEffect("checkpoints always load on other parallel sizes"),
    "param_dtype": NoEffect("dtype in model_args says it"),
}
"""Keys of a Megatron strategy_config, besides our parallel sizes and recompute keys and all fields
of megatron-core's TransformerConfig."""

UNSUPPORTED_STRATEGIES = {
    "sglang": "the engine here is vLLM: set strategy_name: vllm, and vLLM's arguments",
    "fsdp2_train": "training is on megatron-core: set strategy_name: megatron_train",
    "fsdp2_infer": "set strategy_name: megatron_infer",
    "deepspeed_train": "training is on megatron-core: set strategy_name: megatron_train",
    "deepspeed_infer": "set strategy_name: megatron_infer",
}
"""ROLL's further strategies, with what to take instead."""

STRATEGIES_OF_ROLE = {
    "actor_infer": ("vllm", "hf_infer"),
    "actor_train": ("megatron_train",),
    "critic": ("megatron_train",),
    "reference": ("megatron_infer",),
    "rewards": ("hf_infer", "megatron_infer", "vllm"),
}
"""What may play a role; a reward may also have no strategy."""
