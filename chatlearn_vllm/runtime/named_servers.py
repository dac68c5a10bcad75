"""Are the servers that a yaml names there, before anything starts?

Only where the job starts Ray itself, so that its ranks are on this host: others may reach servers
that this process does not. Each rank asks its server again, and for more.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing

from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.config.server_checks import START
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.vllm_module import VLLMModule
from chatlearn_vllm.runtime.cluster import existing_cluster


def check_named_servers(modules: Iterable[BaseModule]) -> None:
    """Ask every server that is listed in `vllm_server`.

    Raises:
        UserError: one does not answer, asks for another key, or is no vLLM server for the job's
            sequences.
    """
    named = [
        (module, url)
        for module in modules
        if isinstance(module, VLLMModule) and module.model_args.inference_engine == "server"
        for url in module.model_args.vllm_server or ()
        if url != START
    ]
    if named and not existing_cluster():
        for module, url in named:
            _check(module, url)


def _check(module: BaseModule, url: str) -> None:
    from chatlearn_vllm.engines.server_client import ServerClient, ServerError
    from chatlearn_vllm.engines.server_start import find_server

    args = module.model_args
    key = args.vllm_server_api_key.get_secret_value() if args.vllm_server_api_key else None
    client = ServerClient(
        url,
        api_key=key,
        timeout_s=args.vllm_server_timeout,
        max_retries=args.vllm_server_max_retries,
    )
    with closing(client):
        try:
            find_server(client, args.seq_length)
        except ServerError as error:
            raise UserError(f"models.{module.name}: vllm_server: {error}") from error
