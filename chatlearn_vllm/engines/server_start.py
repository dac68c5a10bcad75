"""Is a vLLM server there, and fit for a job? How does a role get its engine on it?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from packaging.version import InvalidVersion, Version

from chatlearn_vllm.config import ModelArgs
from chatlearn_vllm.config.server_checks import START
from chatlearn_vllm.engines import vllm_compat
from chatlearn_vllm.engines.server_client import NotFoundError, ServerClient, ServerError
from chatlearn_vllm.engines.server_process import ServerProcess, start_server
from chatlearn_vllm.engines.vllm_arguments import engine_arguments, resolve_dtype
from chatlearn_vllm.layouts import ModelShape, RolloutParallel, VLLMShards
from chatlearn_vllm.observability.logging import get_logger

if TYPE_CHECKING:
    from chatlearn_vllm.engines.server_rank import ServerRank
    from chatlearn_vllm.engines.vllm_executor import StepOwner

logger = get_logger(__name__)

_TOKENIZER_PROBE = "Solve 12 + 34 = ? Then say WHY, briefly.\n"
_PROBE_TEMPERATURE = 2.0
"""The highest that the API takes."""
_PROBE_LOGPROBS = 5
_LEAST_SPREAD = 1e-6
_NOT_OF_A_SERVER = frozenset({"model", "distributed_executor_backend"})
"""Engine arguments that a server gets in another place."""
_BETTER_IN_A_SERVER = frozenset({"disable_log_stats"})
"""Those whose default is better where steps are another process's."""
_CPU_BINDING = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True)
class ServerFacts:
    """What a server said when the job started."""

    version: str
    """Of vLLM."""
    model: str
    """The name that requests give."""
    max_model_len: int
    on_gpu: bool = False
    """As far as it says so."""
    is_paused: bool = False
    """Whether a weight sync of an earlier job ended midway."""
    can_sleep: bool = False
    """Whether it was started with sleep mode; on CPU vLLM goes through the motions without."""
    boot_ids: tuple[str, ...] | None = None
    """Of its workers, one start of which they name; None where it takes no weights."""
    dtype: str | None = None
    """Of its weights, where it says so."""


def make_server_engine(
    args: ModelArgs,
    *,
    name: str,
    replica: int,
    rank: int,
    seed: int,
    log_dir: Path,
    model_dir: Path,
    shape: ModelShape,
    tokenize: Callable[[str], list[int]],
    owner: StepOwner,
) -> ServerRank:
    """The engine of one rank: on the server that its yaml names, or on one that starts now.

    Collective over the replica; all its ranks are on one host. A server that starts gets the
    devices of all ranks, and the first rank starts it.

    Args:
        args: the role's model arguments.
        name: of the role, for messages.
        replica: which one; the n-th takes the n-th server of `vllm_server`.
        rank: within the replica.
        seed: of a server that is started.
        log_dir: where that writes its log.
        model_dir: Hugging Face directory.
        shape: sizes of the model.
        tokenize: the role's tokenizer, without special tokens.
        owner: see ServerEngine.

    Raises:
        ServerError: the server is not there, or not fit for the job; says the remedy.
        ServerStartError: a server did not come up.
        ValueError: a server could not cut the model for its ranks.
    """
    from chatlearn_vllm.engines.server_engine import ServerEngine
    from chatlearn_vllm.engines.server_rank import ServerPeer

    key = args.vllm_server_api_key.get_secret_value() if args.vllm_server_api_key else None
    on_gpu = torch.cuda.is_available()
    process, has_weights, num_ranks = None, True, 1
    if args.vllm_server == (START,):
        has_weights = args.load_format != "dummy"
        parallel = RolloutParallel(
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        )
        VLLMShards(shape, parallel)  # raises what vLLM would say in its log
        num_ranks = parallel.ranks_per_replica
        environment = server_environment(_devices_of_replica() if on_gpu else (), num_ranks)
        if rank:
            return ServerPeer(
                shape, dtype=resolve_dtype(args, on_gpu=on_gpu), ranks_per_replica=num_ranks,
                has_weights=has_weights,
            )  # fmt: skip
        process = _start(args, name, replica, seed, log_dir, model_dir, shape, environment)
        url, key = process.url, process.api_key
    else:
        url = args.vllm_server[replica]
    client = ServerClient(
        url,
        api_key=key,
        timeout_s=args.vllm_server_timeout,
        max_retries=args.vllm_server_max_retries,
        max_responses=args.max_num_seqs,
    )
    try:
        facts = inspect_server(client, shape, args.seq_length, tokenize)
        if process is not None:
            client.post("/collective_rpc", {"method": "chatlearn_complete_start"})
    except BaseException:
        client.close()
        if process is not None:
            process.stop()
        raise
    logger.info(
        "%s %d generates with vLLM %s at %s, which serves %s and %s",
        name, replica, facts.version, url, facts.model,
        "takes weights" if facts.boot_ids else "takes no weights",
    )  # fmt: skip
    dtype = getattr(torch, facts.dtype) if facts.dtype else resolve_dtype(args, on_gpu=on_gpu)
    seeds = not facts.on_gpu if args.seed_per_response is None else args.seed_per_response
    return ServerEngine(
        client, facts, shape, owner, dtype=dtype, timeout_s=args.vllm_server_timeout,
        process=process, ranks_per_replica=num_ranks,
        has_weights=has_weights and not facts.is_paused, seed_per_response=seeds,
    )  # fmt: skip


def _start(
    args: ModelArgs, name: str, replica: int, seed: int, log_dir: Path, model_dir: Path,
    shape: ModelShape, environment: Mapping[str, str],
) -> ServerProcess:  # fmt: skip
    on_gpu = torch.cuda.is_available()
    arguments, notices = engine_arguments(args, model_dir, shape, seed=seed, on_gpu=on_gpu)
    for notice in notices if replica == 0 else ():
        logger.info("%s: %s", name, notice)
    return start_server(
        str(model_dir),
        server_arguments(arguments, args.engine_args)
        | vllm_compat.server_overrides(pipeline_parallel_size=args.pipeline_model_parallel_size),
        log_dir / f"{name}-{replica}.log",
        timeout_s=args.vllm_server_timeout,
        environment=environment,
    )


def server_arguments(arguments: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of an engine in the process those that its server gets.

    Args:
        arguments: what `engine_arguments` made.
        given: those among them that the user has set by vLLM's own name.
    """
    dropped = {*_NOT_OF_A_SERVER, *(_BETTER_IN_A_SERVER - given.keys())}
    return {name: value for name, value in arguments.items() if name not in dropped}


def server_environment(devices: Sequence[str], num_ranks: int) -> dict[str, str]:
    """Variables that put a server on the devices of its replica.

    Args:
        devices: names of the GPUs as CUDA_VISIBLE_DEVICES has them, in rank order; none on CPUs.
        num_ranks: processes that share the model.
    """
    if devices:
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    if num_ranks > 1 and _CPU_BINDING not in os.environ:
        return {_CPU_BINDING: "nobind"}  # else vLLM wants a NUMA node for each process
    return {}


def _devices_of_replica() -> list[str]:
    """The GPUs of this replica's ranks. Collective."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = torch.cuda.current_device()
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, visible.split(",")[own] if visible else str(own))
    return names


def inspect_server(
    client: ServerClient, shape: ModelShape, seq_length: int, tokenize: Callable[[str], list[int]]
) -> ServerFacts:
    """Ask a server all that a job depends on.

    Args:
        client: calls it.
        shape: sizes of the role's model.
        seq_length: longest sequence of the job.
        tokenize: the role's tokenizer, without special tokens.

    Raises:
        ServerError: it is not there, or not fit; says the remedy.
    """
    version, model, max_model_len = find_server(client, seq_length)
    _check_tokenizer(client, model, tokenize)
    workers = _workers(client)
    if workers is None:
        _probe_logprobs(client, model, shape.vocab_size)
        return ServerFacts(version, model, max_model_len)
    worker = workers[0]
    _require_processed(client, worker["logprobs_mode"])
    if worker["vocab_size"] != shape.vocab_size:
        raise ServerError(
            f"{client.url} serves a model of {worker['vocab_size']} tokens, that of `load` has "
            f"{shape.vocab_size}; let both be the same model"
        )
    if worker["data_parallel_size"] > 1:
        raise ServerError(
            f"{client.url} has data_parallel_size={worker['data_parallel_size']}; a job gives "
            "weights to servers of one copy: start several and list their URLs in vllm_server"
        )
    if worker["device_type"] == "cpu" and worker["dtype"] != "float32":
        raise ServerError(
            f"{client.url} computes in {worker['dtype']} on CPU, where vLLM packs weights once "
            "and for all; start it with --dtype float32"
        )
    return ServerFacts(
        version,
        model,
        max_model_len,
        on_gpu=worker["device_type"] == "cuda",
        is_paused=client.get("/is_paused")["is_paused"],
        can_sleep=worker["has_sleep_mode"] or worker["device_type"] == "cpu",
        boot_ids=tuple(one["boot_id"] for one in workers),
        dtype=worker["dtype"],
    )


def find_server(client: ServerClient, seq_length: int) -> tuple[str, str, int]:
    """Ask a server for vLLM's version, its model's name and longest sequence.

    Args:
        client: calls it.
        seq_length: longest sequence of the job.

    Raises:
        ServerError: it is not there, asks for another key, or its sequences are shorter.
    """
    try:
        client.get("/health")
    except ServerError as error:
        raise ServerError(
            f"{error}; is it running? `chatlearn-vllm serve DIR` starts one, "
            "vllm_server: start has the job do so"
        ) from error
    version = _version(client)
    model, max_model_len = _model(client)
    if max_model_len < seq_length:
        raise ServerError(
            f"{client.url} serves sequences of at most {max_model_len} tokens, seq_length is "
            f"{seq_length}; start it with --max-model-len {seq_length}, or lower seq_length"
        )
    return version, model, max_model_len


def _version(client: ServerClient) -> str:
    try:
        version = client.get("/version")["version"]
    except (NotFoundError, TypeError, KeyError) as error:
        raise ServerError(f"{client.url} is no vLLM server: it has no /version") from error
    try:
        parsed = Version(version)
    except InvalidVersion:
        return version  # built from source
    if parsed.release < vllm_compat.OLDEST.release and not parsed.is_devrelease:
        raise ServerError(
            f"{client.url} runs vLLM {version}; at least {vllm_compat.OLDEST} is needed"
        )
    if parsed >= vllm_compat.FIRST_UNTESTED:
        logger.warning("%s runs vLLM %s, which was not tried yet", client.url, version)
    return version


def _model(client: ServerClient) -> tuple[str, int]:
    """Name and longest sequence of the model that is served; adapters have a parent."""
    served = [model for model in client.get("/v1/models")["data"] if not model.get("parent")]
    if not served or served[0].get("max_model_len") is None:
        raise ServerError(f"{client.url} serves no model that generates")
    return served[0]["id"], served[0]["max_model_len"]


def _check_tokenizer(
    client: ServerClient, model: str, tokenize: Callable[[str], list[int]]
) -> None:
    body = {"model": model, "prompt": _TOKENIZER_PROBE, "add_special_tokens": False}
    try:
        theirs = client.post("/tokenize", body, is_repeatable=True)["tokens"]
    except NotFoundError:
        logger.warning("%s has no /tokenize: its tokenizer is not compared", client.url)
        return
    ours = tokenize(_TOKENIZER_PROBE)
    if theirs != ours:
        raise ServerError(
            f"{client.url} serves {model} with another tokenizer than the job's: of "
            f"{_TOKENIZER_PROBE!r} it makes {theirs[:8]}..., the job {ours[:8]}...; let `load` "
            "(or `tokenizer`) and the server name the same model"
        )


def _workers(client: ServerClient) -> list[dict[str, Any]] | None:
    """What the workers say; None where they have not learned to take weights."""
    try:
        answer = client.post("/collective_rpc", {"method": "chatlearn_describe"})
    except NotFoundError:  # not in vLLM's development mode
        return None
    except ServerError as error:
        if "chatlearn_describe" in str(error) or "status 500" in str(error):
            return None
        raise
    return answer["results"]


def _require_processed(client: ServerClient, mode: str) -> None:
    if mode != "processed_logprobs":
        raise ServerError(
            f"{client.url} answers with logprobs_mode={mode}: not of the distribution that tokens "
            "are drawn from, so they cannot be trained on; start it with "
            "--logprobs-mode processed_logprobs"
        )


def _probe_logprobs(client: ServerClient, model: str, vocab_size: int) -> None:
    """Find out whether log-probabilities are those after the temperature.

    Only then do the distances between the most probable tokens shrink as the temperature rises. The
    prompt holds the last token of the vocabulary: a server with fewer refuses it.
    """
    spreads = []
    for temperature in (1.0, _PROBE_TEMPERATURE):
        body = {
            "model": model, "prompt": [vocab_size - 1], "max_tokens": 1, "seed": 0,
            "temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "logprobs": _PROBE_LOGPROBS,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        try:
            answer = client.post("/v1/completions", body, is_repeatable=True)
        except ValueError as error:
            raise ServerError(
                f"{error}; the job asked with token {vocab_size - 1}, the last of the vocabulary "
                "of `load`: let both be the same model"
            ) from error
        (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        best = sorted(top.values(), reverse=True)[:_PROBE_LOGPROBS]
        spreads.append(best[0] - best[-1])
    if spreads[0] < _LEAST_SPREAD:
        logger.warning("%s: all tokens are alike, logprobs_mode is not known", client.url)
    elif spreads[1] > spreads[0] * (1 + 1 / _PROBE_TEMPERATURE) / 2:
        _require_processed(client, "raw_logprobs")
