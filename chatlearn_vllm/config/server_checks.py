"""What may be asked of `inference_engine: server`, and how must its servers be named?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from chatlearn_vllm.config.problems import without_credentials

if TYPE_CHECKING:
    from chatlearn_vllm.config.model_args import ModelArgs
    from chatlearn_vllm.config.problems import Key
    from chatlearn_vllm.config.schema import ModelConfig

START = "start"
"""In place of a URL: the job starts the servers."""

SAMPLING_KEYS = frozenset({
    "max_tokens", "seed", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "ignore_eos", "stop", "stop_token_ids", "logprobs",
    "prompt_logprobs", "skip_special_tokens", "spaces_between_special_tokens", "min_tokens",
    "include_stop_str_in_output", "logit_bias", "allowed_token_ids", "bad_words",
    "structured_outputs",
})  # fmt: skip
"""Fields of vLLM's SamplingParams that its completions API takes under the same name."""


def engine_of(args: ModelArgs) -> str:
    """`inference_engine`, where the keys of GRPO examples say it in other words, too."""
    if "inference_engine" in args.model_fields_set:
        return args.inference_engine
    if args.use_vllm is False:
        return "transformers"
    return "server" if args.vllm_server else args.inference_engine


def server_problems(model: ModelConfig) -> Iterator[tuple[Key, str]]:
    """Keys of a model that generates which contradict each other, with the remedy."""
    args, at = model.model_args, ("models", model.name, "model_args")
    if model.trainable:
        return
    if args.use_vllm is False and args.inference_engine != "transformers":
        rule = f"contradicts inference_engine: {args.inference_engine}; leave one of them out"
        yield (*at, "use_vllm"), rule
    elif args.use_vllm and args.inference_engine == "transformers":
        yield (*at, "use_vllm"), "contradicts inference_engine: transformers; leave one of them out"
    if args.inference_engine != "server":
        if args.vllm_server:
            rule = (
                f"is not used with inference_engine: {args.inference_engine}; leave it out, or set "
                "inference_engine: server"
            )
            yield (*at, "vllm_server"), rule
        return
    if not args.vllm_server:
        rule = "server needs vllm_server: the server's URL, or `start`"
        yield (*at, "inference_engine"), rule
        return
    yield from _address_problems(model, args.vllm_server)
    for name in args.sampling_args:
        if name not in SAMPLING_KEYS:
            rule = (
                "is none of the sampling keys of vLLM's completions API; leave it out, or set "
                "inference_engine: vllm"
            )
            yield (*at, name), rule
    for name in args.engine_args if args.vllm_server != (START,) else ():
        flag = f"--{name.replace('_', '-')}"
        yield (*at, name), f"is up to the server; start it with {flag}, and leave it out here"


def _address_problems(model: ModelConfig, addresses: tuple[str, ...]) -> Iterator[tuple[Key, str]]:
    at = ("models", model.name, "model_args")
    key = (*at, "vllm_server")
    if addresses == (START,):
        yield from _started_problems(model, at)
        return
    for address in addresses:
        if problem := _url_problem(address):
            rule = f"{without_credentials(address)}: {problem}; write http://HOST:PORT, or `start`"
            yield key, rule
            return
    num_servers, num_replicas = len(addresses), model.num_replica
    if num_servers != num_replicas:
        rule = (
            f"names {num_servers} servers for {num_replicas} replicas; each replica has a server "
            f"of its own: set num_cpu: {num_servers * model.cpu_per_process}"
        )
        yield key, rule
    elif len({_place_of(address) for address in addresses}) < num_servers:
        yield key, "names a server twice; each replica has a server of its own"


def _started_problems(model: ModelConfig, at: Key) -> Iterator[tuple[Key, str]]:
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if model.num_gpu == 0 and tensor * pipeline > 1:
        size = "tensor" if tensor > 1 else "pipeline"
        rule = (
            f"a server that the job starts takes a device for each of its {tensor * pipeline} "
            f"ranks; set num_gpu: {tensor * pipeline * model.num_replica} in place of num_cpu (on "
            "a machine without GPUs they are CPU cores)"
        )
        yield (*at, f"{size}_model_parallel_size"), rule


def _place_of(address: str) -> tuple[str, str | None, int]:
    """Where a server listens, however its URL is written."""
    parts = urlsplit(address)
    host = "localhost" if parts.hostname in ("127.0.0.1", "::1") else parts.hostname
    return parts.scheme, host, parts.port or {"http": 80, "https": 443}[parts.scheme]


def _url_problem(address: str) -> str | None:
    try:
        parts = urlsplit(address)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
        parts.port  # noqa: B018  raises if it is no number below 65536
    except ValueError as error:
        return str(error)
    if not is_url or any(character.isspace() for character in address):
        return "is no http or https URL"
    if parts.path.strip("/") or parts.query or parts.fragment:
        return "must have no path after the port (no /v1)"
    if parts.username or parts.password:
        return "must hold no key; that goes into vllm_server_api_key"
    return None
