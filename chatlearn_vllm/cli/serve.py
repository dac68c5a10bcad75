"""How is a trained policy served with an OpenAI API?

`chatlearn-vllm serve CKPT` runs vLLM's own server. A trainer's checkpoint is first written in
Hugging Face form, into a directory that is removed when the server ends.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

_RETIRED_FLAGS = {
    "--speculative-model": '--speculative-config \'{"method": "draft_model", "model": "DIR", '
    '"num_speculative_tokens": 5}\'',
    "--num-speculative-tokens": "num_speculative_tokens in --speculative-config",
    "--swap-space": "nothing: preempted requests are computed again",
    "--use-v2-block-manager": "nothing: there is one block manager",
    "--disable-log-requests": "nothing: requests are logged with --enable-log-requests only",
}
"""Flags of older vLLM versions -> what stands in their place."""

_VLLM_PORT = 8000
"""Where vLLM listens unless told otherwise."""

_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
"""That vLLM knows."""

_LISTENING_FLAGS = ("--host", "--port", "--uds", "--config")
_KV_CACHE_FLAGS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
HELP = "serve a trainer's checkpoint, or a Hugging Face directory, with an OpenAI API"
USER_ERROR = 2


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    command.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a Hugging Face directory; or a trainer's directory of checkpoints, of which the "
        "newest complete one is taken, or one of its iter_* directories",
    )
    command.add_argument("--host", help="address to listen on; default: vLLM's, all addresses")
    command.add_argument("--port", type=int, help="default: vLLM's, 8000")
    command.add_argument(
        "--tensor-parallel-size", type=int, metavar="N", help="GPUs that share each layer"
    )
    command.add_argument(
        "--served-model-name", metavar="NAME", help="that requests give; default: CKPT as given"
    )
    command.add_argument(
        "--dtype", help="of the weights; default: that of the checkpoint, float32 included; "
        "float32 for --weight-updates without GPU",
    )  # fmt: skip
    command.add_argument(
        "--weight-updates",
        action="store_true",
        help="take new weights from a job (vllm_server in its yaml); needs a key in VLLM_API_KEY, "
        "and listens on 127.0.0.1 unless --host says otherwise",
    )
    command.epilog = "After -- any flags of `vllm serve`: serve CKPT -- --max-model-len 8192"


def serve(arguments: argparse.Namespace) -> int:
    """Serve until the server ends, or this process is told to end; an exit code."""
    from chatlearn_vllm.engines.server_process import serve_command
    from chatlearn_vllm.engines.server_watch import run

    checkpoint = Path(arguments.checkpoint)
    try:
        check(arguments, os.environ)
        with ExitStack() as stack:
            model = checkpoint
            if not (checkpoint / "config.json").is_file():
                directory = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="chatlearn_vllm-serve-")
                )
                model = Path(directory) / "model"
                print(f"{_export(checkpoint, model)} is written to {model}", flush=True)
            return run(
                serve_command(str(model), vllm_arguments(arguments, model), arguments.flags),
                should_end=lambda: False,
                environment={**os.environ, **_environment(arguments)},
                signals=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return USER_ERROR


def check(arguments: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Find what vLLM would say late, or not at all.

    Raises:
        ValueError: says the rule and the remedy.
    """
    from chatlearn_vllm.config.model_files import read_json_object
    from chatlearn_vllm.config.parallel_checks import sizes_that_divide

    if not Path(arguments.checkpoint).is_dir():
        raise ValueError(
            f"CKPT={arguments.checkpoint}: no such directory; a model of the Hugging Face hub is "
            "served by `vllm serve`"
        )
    if arguments.port is not None and not 0 < arguments.port < 2**16:
        raise ValueError(f"--port {arguments.port}: must be from 1 to 65535")
    if arguments.tensor_parallel_size is not None and arguments.tensor_parallel_size < 1:
        raise ValueError(f"--tensor-parallel-size {arguments.tensor_parallel_size}: must be >= 1")
    if arguments.dtype not in (None, *_DTYPES):
        raise ValueError(f"--dtype {arguments.dtype}: must be one of {', '.join(_DTYPES)}")
    config = Path(arguments.checkpoint, "config.json")
    heads = read_json_object(config).get("num_attention_heads") if config.is_file() else None
    if heads and heads % (arguments.tensor_parallel_size or 1):
        raise ValueError(
            f"--tensor-parallel-size {arguments.tensor_parallel_size}: must divide the {heads} "
            f"attention heads of {config}; set it to one of {sizes_that_divide(heads)}"
        )
    for flag, instead in _RETIRED_FLAGS.items():
        if _is_given(flag, arguments.flags):
            raise ValueError(f"{flag}: vLLM no longer has it; instead: {instead}")
    if arguments.weight_updates and not environment.get("VLLM_API_KEY"):
        raise ValueError(
            "--weight-updates: who reaches such a server can change its model; set VLLM_API_KEY to "
            "a secret, and vllm_server_api_key: ${VLLM_API_KEY} in the job"
        )
    _require_free_port(arguments)


def _require_free_port(arguments: argparse.Namespace) -> None:
    """Before a checkpoint is written for a server that cannot listen."""
    if any(_is_given(flag, arguments.flags) for flag in _LISTENING_FLAGS):
        return
    port, host = arguments.port or _VLLM_PORT, arguments.host or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"--port {port}: another process listens there; name a free one"
                ) from None


def vllm_arguments(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Arguments of vLLM's server of `model`, a Hugging Face directory, by their Python names."""
    import torch

    from chatlearn_vllm.engines.server_process import weight_update_arguments
    from chatlearn_vllm.engines.vllm_arguments import cpu_kv_cache_bytes

    chosen = {
        "host": arguments.host,
        "port": arguments.port,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "served_model_name": arguments.served_model_name or arguments.checkpoint,
        "dtype": arguments.dtype,
    }
    if arguments.dtype is None and _is_float32(model):
        chosen["dtype"] = "float32"  # vLLM's own choice is half precision, with other tokens
    if not torch.cuda.is_available():
        # On CPU vLLM's engine fails where a step ends inside the prompt of a request with a seed.
        chosen["enable_chunked_prefill"] = False
        is_given = any(_is_given(flag, arguments.flags) for flag in _KV_CACHE_FLAGS)
        if not is_given and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            chosen["kv_cache_memory_bytes"] = cpu_kv_cache_bytes()
    if arguments.weight_updates:
        chosen |= weight_update_arguments()
        chosen["host"] = arguments.host or "127.0.0.1"
        if not _is_given("--logprobs-mode", arguments.flags):
            # Log-probabilities of the distribution that is drawn from, which is trained on.
            chosen["logprobs_mode"] = "processed_logprobs"
        if arguments.dtype is None and not torch.cuda.is_available():
            chosen["dtype"] = "float32"  # vLLM packs half precision on CPU, once and for all
    return chosen


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    from chatlearn_vllm.engines.server_process import weight_update_environment

    if not arguments.weight_updates:
        return {}
    return weight_update_environment(os.environ["VLLM_API_KEY"])


def _is_float32(model: Path) -> bool:
    from chatlearn_vllm.config.model_files import read_config_json

    config = read_config_json(str(model))
    return (config.get("dtype") or config.get("torch_dtype")) == "float32"


def _is_given(flag: str, flags: Sequence[str]) -> bool:
    return any(one.partition("=")[0].replace("_", "-") == flag for one in flags)


def _export(checkpoint: Path, out: Path) -> Path:
    from chatlearn_vllm.engines.megatron.export import export

    return export(checkpoint, out)
