"""What can a user do from the command line?

Everything heavy is imported after the arguments are read, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import sys
from collections.abc import Sequence

from chatlearn_vllm.version import __version__

READER_GONE = 128 + signal.SIGPIPE
_PRINTING = ("plan", "sync-plan")
USER_ERROR = 2
"""Exit code for a job that cannot start as described."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Without `argv`, the process's own arguments."""
    arguments = _parse(list(sys.argv[1:] if argv is None else argv))
    from chatlearn_vllm.config import UserError

    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if arguments.command not in _PRINTING:
            raise
        # Whoever read the output, as in `... | head`, has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _parse(argv: list[str]) -> argparse.Namespace:
    """Read the arguments; for `serve` those after -- are vLLM's."""
    is_split = argv[:1] == ["serve"] and "--" in argv
    end = argv.index("--") if is_split else len(argv)
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv[:end])
    if unknown:
        parser.error(_unknown(arguments.command, unknown))
    arguments.flags = argv[end + 1 :]
    return arguments


def _unknown(command: str, unknown: Sequence[str]) -> str:
    """What to say about arguments that a command does not take."""
    given = " ".join(unknown)
    if command == "serve":
        return f"{given}: flags of `vllm serve` come last, after --: serve CKPT -- {given}"
    return f"{given}: {command} takes no such argument; see chatlearn-vllm {command} --help"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chatlearn-vllm",
        description="Reinforcement learning of language models: Megatron trains, vLLM generates.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, run, help_text in (
        ("launch", _launch, "run a job with the script that its runtime.entry_script names"),
        ("plan", _plan, "check a job and show which rank runs on which device; starts nothing"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("job", metavar="JOB.yaml", help="the job's main yaml file")
        command.add_argument(
            "overrides",
            nargs="*",
            default=[],  # else argparse calls it required
            metavar="key=value",
            help="as in runtime.num_episode=3 or models.policy.model_args.temperature=0.7",
        )
        command.set_defaults(run=run)
    _add_sync_plan(commands)
    _add_export(commands)
    _add_bench(commands)
    _add_serve(commands)
    return parser


def _add_sync_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    help_text = "show what a weight sync moves for given parallel sizes; needs no GPU"
    command = commands.add_parser("sync-plan", help=help_text, description=help_text)
    command.set_defaults(run=_sync_plan)
    command.add_argument("--model", required=True, metavar="DIR", help="holds config.json")
    command.add_argument(
        "--train",
        required=True,
        metavar="tp=4,pp=2",
        help="sizes of megatron-core's groups; further keys: vpp, ep, etp, dp, and the layers of "
        "the first and last pipeline stage: first, last",
    )
    command.add_argument(
        "--rollout",
        required=True,
        metavar="tp=8",
        help="sizes of vLLM's engines; further keys: pp, replicas, and ep=true for expert parallel",
    )
    command.add_argument(
        "--gpus", type=int, help="that both sides share; default: as many as the sizes ask for"
    )
    command.add_argument("--gpus-per-host", type=int, default=8, help="default: 8")
    command.add_argument(
        "--network-gbs",
        type=float,
        default=50.0,
        help="GB/s of one GPU to another host; default: 50, assumed",
    )
    command.add_argument("--json", action="store_true", help="print one line of JSON")


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    help_text = "write a trainer's checkpoint in Hugging Face form; needs no GPU"
    command = commands.add_parser("export", help=help_text, description=help_text)
    command.set_defaults(run=_export)
    command.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a trainer's directory of checkpoints, of which the newest complete one is taken, or "
        "one of its iter_* directories",
    )
    command.add_argument("out", metavar="OUT", help="directory to be made")
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights written; default: that of training",
    )
    command.add_argument(
        "--adapter",
        action="store_true",
        help="write LoRA adapters by themselves, for PEFT, instead of merging them",
    )


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from chatlearn_vllm.bench.options import add_arguments

    help_text = "measure engines that generate: transformers, vLLM, vLLM through VLLMModule"
    command = commands.add_parser("bench", help=help_text, description=help_text)
    command.set_defaults(run=_bench)
    add_arguments(command)


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from chatlearn_vllm.cli import serve

    command = commands.add_parser("serve", help=serve.HELP, description=serve.HELP)
    command.set_defaults(run=serve.serve)
    serve.add_arguments(command)


def _launch(arguments: argparse.Namespace) -> int:
    from chatlearn_vllm.config import ConfigError, Problem, load_config

    job = load_config(arguments.job, arguments.overrides, check_files=True)
    script = job.entry_script
    if script is None:
        rule = "must name the Python script that runs the job"
        raise ConfigError([Problem(job.path, "runtime.entry_script", rule)])
    # As `python SCRIPT -c JOB.yaml key=value ...` would have it.
    sys.argv = [str(script), "-c", arguments.job, *arguments.overrides]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from chatlearn_vllm.config import load_config
    from chatlearn_vllm.job import place

    job = load_config(arguments.job, arguments.overrides)
    print(place(job).describe())
    for notice in job.notices:
        print(f"note: {notice}")
    return 0


def _sync_plan(arguments: argparse.Namespace) -> int:
    from chatlearn_vllm.weight_sync.report import report
    from chatlearn_vllm.weight_sync.sync_options import OptionError, SyncOptions

    try:
        options = SyncOptions.parse(
            arguments.model,
            arguments.train,
            arguments.rollout,
            num_gpus=arguments.gpus,
            gpus_per_host=arguments.gpus_per_host,
            network_bytes_per_s=arguments.network_gbs * 1e9,
        )
    except OptionError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    result = report(options)
    print(result.to_json() if arguments.json else result.describe())
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from chatlearn_vllm.engines.megatron.export import export

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    try:
        source = export(
            Path(arguments.checkpoint),
            Path(arguments.out),
            dtype=dtype,
            adapter_only=arguments.adapter,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    print(f"{source} is now in {arguments.out}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from chatlearn_vllm.bench.cases import OptionError
    from chatlearn_vllm.bench.command import bench

    given = vars(arguments)
    try:
        return bench({name: given[name] for name in given.keys() - {"run"}})
    except OptionError as error:
        print(error, file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
