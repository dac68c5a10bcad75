"""Which values follow from others?"""

from typing import Any

from chatlearn_vllm.config.gather import COMMAND_LINE
from chatlearn_vllm.config.model_args import DTYPE_OF_FLAG, ModelArgs
from chatlearn_vllm.config.schema import JobConfig, ModelConfig
from chatlearn_vllm.config.server_checks import engine_of
from chatlearn_vllm.config.tree import Tree

_PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)

_NGRAM_NAMES = ("ngram", "[ngram]")
"""What vLLM takes in place of a draft's directory."""


def derive(job: JobConfig, tree: Tree) -> JobConfig:
    """Fill in the values that were not given and follow from others.

    Args:
        job: as the user gave it.
        tree: who gave what.
    """
    models = {
        name: _derive_model(_with_devices(model), job, tree) for name, model in job.models.items()
    }
    shards = [model.data_parallel_size for model in models.values() if model.trainable]
    rows_per_pass = job.runtime.train_micro_batch_size * max([1, *shards])
    rows_per_step = job.runtime.train_global_batch_size or rows_per_pass
    runtime = job.runtime.model_copy(update={"train_global_batch_size": rows_per_step})
    return job.model_copy(update={"models": models, "runtime": runtime})


def _with_devices(model: ModelConfig) -> ModelConfig:
    """The model with as many devices as its device_mapping names, unless num_gpu says a number."""
    if model.device_mapping is None or "num_gpu" in model.model_fields_set:
        return model
    return model.model_copy(update={"num_gpu": len(model.device_mapping)})


def _derive_model(model: ModelConfig, job: JobConfig, tree: Tree) -> ModelConfig:
    args = model.model_args
    sizes = {size: _parallel_size(model, size, tree) for size in _PARALLEL_SIZES}
    changes: dict[str, Any] = dict(sizes)
    recompute = "selective" if args.recompute_activations else None
    derived = {
        "tokenizer": args.tokenizer or args.load,
        "dtype": _dtype(args),
        "inference_engine": engine_of(args),
        # As Megatron does, so that files for any tensor parallel size may ask for it.
        "sequence_parallel": args.sequence_parallel and sizes["tensor_model_parallel_size"] > 1,
        "recompute_granularity": args.recompute_granularity or recompute,
        "speculative_config": _speculative_config(args),
    }
    changes["model_args"] = args.model_copy(update=derived | sizes)
    if (model.generation_batch_size or 0) <= 0:
        changes["generation_batch_size"] = job.runtime.generation_batch_size
    if model.free_memory:
        changes["offload_weights"] = True
        if model.trainable:
            changes |= {"free_grad_buffers": True, "offload_optimizer_states": True}
    return model.model_copy(update=changes)


def _parallel_size(model: ModelConfig, size: str, tree: Tree) -> int:
    """The model file's value wins over the job file's, the command line over both."""
    on_command_line = tree.origin(("models", model.name, size))[0] == COMMAND_LINE
    in_model_file = size in model.model_args.model_fields_set
    if on_command_line and size in model.model_fields_set:
        return getattr(model, size)
    return getattr(model.model_args if in_model_file else model, size)


def _dtype(args: ModelArgs) -> str:
    """Megatron's flags say what `dtype` leaves open: float32, if they are given and none is set."""
    flagged = [dtype for flag, dtype in DTYPE_OF_FLAG.items() if args[flag]]
    if args.dtype != "auto":
        return args.dtype
    return flagged[0] if flagged else "float32" if args.bf16 is False else "auto"


def _speculative_config(args: ModelArgs) -> dict[str, Any] | None:
    """vLLM's map, with what the older keys say and vLLM's choice of a method if none is named."""
    older = {"model": args.speculative_model, "num_speculative_tokens": args.num_speculative_tokens}
    given = {key: value for key, value in older.items() if value is not None}
    config = given | (args.speculative_config or {})
    if not config:
        return None
    if config.get("method") is None:
        config["method"] = "ngram" if config.get("model") in _NGRAM_NAMES else "draft_model"
    if config["method"] == "ngram" and config.get("model") in _NGRAM_NAMES:
        del config["model"]
    return config
