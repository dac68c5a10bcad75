"""How do yaml values become vLLM's engine arguments and sampling parameters?"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from chatlearn_vllm.config import ModelArgs
from chatlearn_vllm.config.engine_support import (
    DRAFT_DIR_METHODS,
    NGRAM_METHODS,
    quantization_of_checkpoint,
)
from chatlearn_vllm.config.model_files import (
    OTHER_CONFIG,
    longest_sequence,
    read_config_json,
    rotary_keys,
)
from chatlearn_vllm.engines import vllm_compat
from chatlearn_vllm.layouts import ModelShape

MOST_CAPTURED_TOKENS = 1024
"""Steps of more tokens run without CUDA graphs, whatever `max_num_seqs` is; vLLM's own limit is 512
(1,024 on Blackwell)."""
CAPTURE_STEP = 16
"""vLLM captures every multiple of it above 256."""
CPU_BLOCK_SIZE = 32
"""vLLM's CPU attention takes KV blocks of a multiple of this many tokens."""


def resolve_dtype(args: ModelArgs, *, on_gpu: bool) -> torch.dtype:
    """The dtype of weights and activations.

    On a GPU what the yaml says, `auto` meaning bfloat16; always float32 on CPU, where half
    precision is slower and vLLM would pack its weights. Kernels for AWQ and GPTQ checkpoints need
    half precision there, too.
    """
    if not on_gpu:
        return torch.float32 if quantization_of_checkpoint(args) is None else torch.bfloat16
    return torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)


def engine_arguments(
    args: ModelArgs, model_dir: Path, shape: ModelShape, *, seed: int, on_gpu: bool
) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments for `vllm.EngineArgs`.

    Args:
        args: the policy's model arguments.
        model_dir: Hugging Face directory with config.json, and weights unless `load_format` is
            dummy.
        shape: sizes of the model, to size the KV cache on CPU.
        seed: the engine's seed; the same on all ranks of a replica.
        on_gpu: whether the engine runs on CUDA.

    Returns:
        The arguments, and one sentence for each value that this platform cannot take or that has
        another effect than its user may expect.
    """
    notices: list[str] = []
    dtype = resolve_dtype(args, on_gpu=on_gpu)
    kwargs: dict[str, Any] = {
        "model": str(model_dir),
        "tokenizer": str(args.tokenizer or model_dir),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "load_format": args.load_format,
        "max_model_len": _max_model_len(args, model_dir),
        "max_num_seqs": args.max_num_seqs,
        "block_size": args.block_size,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "enforce_eager": args.enforce_eager,
        "enable_prefix_caching": args.enable_prefix_caching,
        "tensor_parallel_size": args.tensor_model_parallel_size,
        "pipeline_parallel_size": args.pipeline_model_parallel_size,
        "enable_expert_parallel": args.enable_expert_parallel,
        "distributed_executor_backend": "external_launcher",
        # Log-probabilities of the distribution that was really sampled from.
        "logprobs_mode": "processed_logprobs",
        # Counting takes a tenth of the time of a step that does not wait for the GPU.
        "disable_log_stats": not (
            args.log_metrics
            or args.speculative_config
            or args.engine_args.get("otlp_traces_endpoint")  # traces hold what is counted
        ),
    }
    if args.quantization is not None:
        kwargs["quantization"] = args.quantization
    if args.speculative_config is not None:
        kwargs["speculative_config"] = speculative_arguments(args.speculative_config)
    if args.max_num_batched_tokens is not None:
        kwargs["max_num_batched_tokens"] = max(args.max_num_batched_tokens, args.max_num_seqs)
    if on_gpu:
        kwargs["enable_sleep_mode"] = True
        kwargs |= _cuda_graphs(args)
        kwargs |= vllm_compat.engine_defaults(args.speculative_config)
        if shape.num_experts and args.weight_sync_path != "load_weights":
            # The kernels that work on weights as the checkpoint has them; auto may rearrange.
            kwargs["moe_backend"] = "triton"
    else:
        notices += _adapt_to_cpu(kwargs, args, shape)
    kwargs.update(args.engine_args)
    if not on_gpu:
        notices += _keep_prompts_whole(kwargs)
    widest = max(args.beam_width(is_eval=is_eval) for is_eval in (False, True))
    if widest > 1 and kwargs.get("max_logprobs") != -1:
        # vLLM's own limit is 20 most probable tokens.
        kwargs["max_logprobs"] = max(kwargs.get("max_logprobs", 20), 2 * widest)
    return kwargs, notices


def _max_model_len(args: ModelArgs, model_dir: Path) -> int:
    """`seq_length`, and room behind it for drafts, as far as vLLM is sure to take it.

    When one sequence of a step is so near to the end that drafts after its drafts would not fit,
    vLLM drafts nothing for any of them. With asynchronous scheduling it reckons with those of the
    step that has not ended, too.
    """
    given = args.engine_args
    drafted = (args.speculative_config or {}).get("num_speculative_tokens") or 0
    if not drafted or given.keys() & {*OTHER_CONFIG, "disable_sliding_window"}:
        return args.seq_length
    config = read_config_json(str(model_dir))
    if (longest := longest_sequence(config)) is None:
        return args.seq_length
    limits = [args.seq_length + 3 * (drafted + 1), longest]
    # Beyond that length some models turn their positions in another way (longrope).
    original = rotary_keys(config).get("original_max_position_embeddings")
    if original is not None and original >= args.seq_length:
        limits.append(original)
    if given.get("enable_chunked_prefill") is False and args.max_num_batched_tokens is not None:
        limits.append(args.max_num_batched_tokens)
    return max(args.seq_length, min(limits))


def _cuda_graphs(args: ModelArgs) -> dict[str, Any]:
    """Have CUDA graphs for steps in which all of many sequences are decoded.

    Without one a step of an 8 B model launches some 400 kernels from Python. An engine that drafts
    has sizes of vLLM's own choice, which it makes only if no other is named.
    """
    of_user = ("compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size")
    if args.enforce_eager or args.speculative_config or args.engine_args.keys() & set(of_user):
        return {}
    if args.max_num_seqs <= 512:
        return {}
    largest = math.ceil(args.max_num_seqs / CAPTURE_STEP) * CAPTURE_STEP
    return {"max_cudagraph_capture_size": min(largest, MOST_CAPTURED_TOKENS)}


def _adapt_to_cpu(kwargs: dict[str, Any], args: ModelArgs, shape: ModelShape) -> list[str]:
    notices = []
    wanted = kwargs["block_size"]
    block_size = math.ceil((wanted or CPU_BLOCK_SIZE) / CPU_BLOCK_SIZE) * CPU_BLOCK_SIZE
    if wanted and wanted != block_size:
        notices.append(
            f"block_size: {wanted} becomes {block_size} (vLLM on CPU takes multiples of "
            f"{CPU_BLOCK_SIZE})"
        )
    kwargs["block_size"] = block_size
    if not kwargs["enforce_eager"]:
        kwargs["enforce_eager"] = True
        notices.append("enforce_eager: true (compiling on CPU takes longer than it saves)")
    notices.append("sleep mode: off (not on CPU); sleep and wake only change the engine's state")
    if args.dtype not in ("auto", kwargs["dtype"]):
        notices.append(f"dtype: {args.dtype} becomes {kwargs['dtype']} (CPU)")
    if args.engine_args.get("kv_cache_memory_bytes") is None:
        # Room for max_num_seqs full sequences.
        tokens, token_bytes = kwargs["max_model_len"], _kv_token_bytes(shape, args)
        if speculative := args.speculative_config:
            if speculative["method"] in DRAFT_DIR_METHODS:
                token_bytes += _draft_kv_token_bytes(read_config_json(speculative["model"]))
        blocks = args.max_num_seqs * math.ceil(tokens / block_size) + 1
        wanted_bytes = blocks * block_size * token_bytes
        kwargs["kv_cache_memory_bytes"] = min(wanted_bytes, cpu_kv_cache_bytes())
    return notices


def _keep_prompts_whole(kwargs: dict[str, Any]) -> list[str]:
    """Have no step end inside a prompt, on CPU.

    vLLM then takes back the random number that it drew too early for a request with a seed, which
    PyTorch's generators on CPU cannot: the engine fails.
    """
    notices = []
    if kwargs.get("enable_chunked_prefill"):
        notices.append("enable_chunked_prefill: off (CPU: fails with seeds of requests)")
    kwargs["enable_chunked_prefill"] = False
    if kwargs.pop("long_prefill_token_threshold", None):
        notices.append("long_prefill_token_threshold: left out (CPU: a step takes whole prompts)")
    longest, most = kwargs["max_model_len"], kwargs.get("max_num_batched_tokens")
    if most is not None and most < longest:
        kwargs["max_num_batched_tokens"] = longest
        notices.append(
            f"max_num_batched_tokens: {most} becomes {longest} (CPU: a step takes whole prompts)"
        )
    return notices


def _kv_token_bytes(shape: ModelShape, args: ModelArgs) -> int:
    """Of the keys and values of a token on one rank, in float32."""
    heads = math.ceil(shape.num_query_groups / args.tensor_model_parallel_size)
    return 2 * 4 * heads * shape.head_dim * shape.num_layers


def _draft_kv_token_bytes(config: Mapping[str, Any]) -> int:
    """The same for a draft; of its config.json, which may be of a kind that has no layouts."""
    heads = config.get("num_attention_heads", 1)
    head_dim = config.get("head_dim") or config.get("hidden_size", 1) // heads
    groups = config.get("num_key_value_heads") or heads
    return 2 * 4 * groups * head_dim * config.get("num_hidden_layers", 1)


def speculative_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM's `speculative_config` is to be.

    A draft is loaded from its own directory, whatever the model that verifies it waits for.
    """
    if config["method"] in NGRAM_METHODS:
        return dict(config)
    return {"draft_load_config": {"load_format": "auto"}} | dict(config)


def cpu_kv_cache_bytes() -> int:
    """Most that keys and values take of the host's memory: a quarter; vLLM would take 92 %."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def sampling_arguments(args: ModelArgs, *, is_eval: bool) -> dict[str, Any]:
    """Keyword arguments for `vllm.SamplingParams`, without `max_tokens` and `seed`.

    Evaluation takes each `eval_*` key that is set and asks for one response per prompt. Where beams
    are asked for, the keys are those of `beam_search.BeamSearchKeys`.
    """
    if (width := args.beam_width(is_eval=is_eval)) > 1:
        return {
            "beam_width": width,
            "n": 1 if is_eval else args.responses_per_prompt,
            "length_penalty": args.length_penalty,
            "ignore_eos": args.ignore_eos,
            "stop_token_ids": args.sampling_args.get("stop_token_ids", ()),
            "skip_special_tokens": args.skip_special_tokens,
        }
    prefix = "eval_" if is_eval else ""
    names = (
        "temperature", "top_p", "top_k", "min_p",
        "presence_penalty", "frequency_penalty", "repetition_penalty",
    )  # fmt: skip
    sampling = {name: args[f"{prefix}{name}"] for name in names}
    sampling.update(
        n=1 if is_eval else args.responses_per_prompt,
        ignore_eos=args.ignore_eos,
        stop=[token for token in (args.stop_token_list or "").split(";") if token],
        logprobs=0,  # the sampled token only
        prompt_logprobs=args.prompt_logprobs,
        skip_special_tokens=args.skip_special_tokens,
    )
    return sampling | args.sampling_args


def max_response_tokens(args: ModelArgs, prompt_length: int) -> int:
    """How many tokens a response may have.

    `new_token_limit: True` allows `max_new_tokens`, False all that fits; never more than
    `seq_length` for prompt and response together.
    """
    room = args.seq_length - prompt_length
    return min(args.max_new_tokens, room) if args.new_token_limit else room
