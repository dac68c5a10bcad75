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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
                stack.enter_context(_ended_by_signals())
                directory = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="chatlearn_vllm-serve-")
                )
                model = Path(directory) / "model"
                print(f"{_export(checkpoint, model)} is written to {model}", flush=True)
                _require_dividing_size(arguments, model / "config.json")
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
    _require_dividing_size(arguments, Path(arguments.checkpoint, "config.json"))
    given = _given(arguments.flags)
    for flag, instead in _RETIRED_FLAGS.items():
        if flag in given:
            raise ValueError(f"{flag}: vLLM no longer has it; instead: {instead}")
    if arguments.weight_updates and not environment.get("VLLM_API_KEY"):
        raise ValueError(
            "--weight-updates: who reaches such a server can change its model; set VLLM_API_KEY to "
            "a secret, and vllm_server_api_key: ${VLLM_API_KEY} in the job"
        )
    if arguments.weight_updates and "--api-key" in given:
        raise ValueError(
            "--api-key: a server that takes weights has one key, that of VLLM_API_KEY; leave it out"
        )
    _require_free_port(arguments)


def _require_dividing_size(arguments: argparse.Namespace, config: Path) -> None:
    from chatlearn_vllm.config.model_files import read_json_object
    from chatlearn_vllm.config.parallel_checks import sizes_that_divide

    heads = read_json_object(config).get("num_attention_heads") if config.is_file() else None
    size = arguments.tensor_parallel_size or 1
    if heads and heads % size:
        raise ValueError(
            f"--tensor-parallel-size {size}: must divide the {heads} attention heads of "
            f"{arguments.checkpoint}; set it to one of {sizes_that_divide(heads)}"
        )


def _require_free_port(arguments: argparse.Namespace) -> None:
    """Before a checkpoint is written for a server that cannot listen."""
    if not _given(arguments.flags).isdisjoint(_LISTENING_FLAGS):
        return
    port, host = arguments.port or _VLLM_PORT, _host(arguments) or ""
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
            where = f"--host {host} --port {port}" if host else f"--port {port}"
            raise ValueError(f"{where}: no server can listen there: {error}") from None


def _host(arguments: argparse.Namespace) -> str | None:
    """Where the server listens; None leaves it to vLLM."""
    return arguments.host or ("127.0.0.1" if arguments.weight_updates else None)


def vllm_arguments(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Arguments of vLLM's server of `model`, a Hugging Face directory, by their Python names."""
    import torch

    from chatlearn_vllm.engines.server_process import weight_update_arguments
    from chatlearn_vllm.engines.vllm_arguments import cpu_kv_cache_bytes

    names = ("host", "port", "tensor_parallel_size", "served_model_name", "dtype")
    asked = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    given = _given(arguments.flags)
    chosen: dict[str, Any] = {"host": _host(arguments), "served_model_name": arguments.checkpoint}
    if _is_float32(model):
        chosen["dtype"] = "float32"  # vLLM's own choice is half precision, with other tokens
    if not torch.cuda.is_available():
        # On CPU vLLM's engine fails where a step ends inside the prompt of a request with a seed.
        chosen["enable_chunked_prefill"] = False
        if given.isdisjoint(_KV_CACHE_FLAGS) and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            chosen["kv_cache_memory_bytes"] = cpu_kv_cache_bytes()
    if arguments.weight_updates:
        # Log-probabilities of the distribution that is drawn from, which is trained on.
        chosen["logprobs_mode"] = "processed_logprobs"
        if not torch.cuda.is_available():
            chosen["dtype"] = "float32"  # vLLM packs half precision on CPU, once and for all
    # To vLLM what stands on its command line counts more than its file of flags.
    chosen = {name: value for name, value in chosen.items() if _flag(name) not in given} | asked
    needed = weight_update_arguments() if arguments.weight_updates else {}
    return chosen | needed


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    from chatlearn_vllm.engines.server_process import weight_update_environment

    if not arguments.weight_updates:
        return {}
    return weight_update_environment(os.environ["VLLM_API_KEY"])


def _is_float32(model: Path) -> bool:
    from chatlearn_vllm.config.model_files import read_config_json

    config = read_config_json(str(model))
    return (config.get("dtype") or config.get("torch_dtype")) == "float32"


def _flag(name: str) -> str:
    return f"--{name.lstrip('-').replace('_', '-')}"


def _given(flags: Sequence[str]) -> set[str]:
    """Flags of vLLM's that the user gives, after -- or in the file that --config there names.

    Raises:
        ValueError: there is no such file, or it holds no flags.
    """
    import yaml

    names = {_flag(one.partition("=")[0]) for one in flags if one.startswith("--")}
    file = None
    for place, one in enumerate(flags):
        name, is_one, value = one.partition("=")
        if name == "--config":
            file = value if is_one else "".join(flags[place + 1 : place + 2])
    if file is None:
        return names
    try:
        content = yaml.safe_load(Path(file).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {file}: must hold a map of vLLM's flags")
    return names | {_flag(str(name)) for name in content}


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end this process as errors do, with everything put away."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {one: signal.signal(one, end) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _export(checkpoint: Path, out: Path) -> Path:
    from chatlearn_vllm.engines.megatron.export import export

    return export(checkpoint, out)
