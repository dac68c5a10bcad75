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


def check_named_servers(modules: Iterable[BaseModule]) -> None:
    """Ask every server that is listed in `vllm_server`.

    Raises:
        UserError: one does not answer, asks for another key, or is no vLLM server for the job's
            sequences.
    """
    for module in modules:
        args = module.model_args
        if args.inference_engine == "server" and args.vllm_server != (START,):
            for url in args.vllm_server:
                _check(module, url)


def _check(module: BaseModule, url: str) -> None:
    from chatlearn_vllm.engines.server_client import ServerClient, ServerError
    from chatlearn_vllm.engines.server_start import find_server

    args = module.model_args
    key = args.vllm_server_api_key.get_secret_value() if args.vllm_server_api_key else None
    seconds = args.vllm_server_timeout
    client = ServerClient(url, api_key=key, timeout_s=seconds, max_retries=0)
    with closing(client):
        try:
            find_server(client, args.seq_length)
        except ServerError as error:
            raise UserError(f"models.{module.name}: vllm_server: {error}") from error
