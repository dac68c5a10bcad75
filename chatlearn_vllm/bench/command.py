"""What happens from the command line of a benchmark to its report?"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from chatlearn_vllm.bench.cases import OptionError
from chatlearn_vllm.bench.environment import options_from_environment
from chatlearn_vllm.bench.merge import merged
from chatlearn_vllm.bench.options import BenchOptions, flag
from chatlearn_vllm.bench.outputs import RESULTS, make_outputs, save_results
from chatlearn_vllm.bench.report import PAGE, print_table, write_report
from chatlearn_vllm.bench.run import Bench

SOME_FAILED = 1
"""Exit code if a case failed."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, SIGTERM or SIGHUP; what was measured is reported."""


def bench(given: Mapping[str, Any]) -> int:
    """Measure and report.

    Args:
        given: the parsed command line: values of the options that the user gave,
            `from_environment` and `report`.

    Returns:
        The exit code.

    Raises:
        OptionError: the options, the model or the machine do not fit together; nothing was started.
    """
    names = {one.name for one in fields(BenchOptions)}
    values = {name: value for name, value in given.items() if name in names}
    if given["report"]:
        return _report([Path(path) for path in given["report"]], values)
    if given["from_environment"]:
        of_variables = options_from_environment(os.environ, values.pop("cases", None))
        values = of_variables | values
    if "cases" in values:
        values["cases"] = tuple(values["cases"])
    options = BenchOptions.of(values)
    out = Path(options.out or _new_directory())
    try:
        run = Bench(
            options,
            out,
            ["chatlearn-vllm", *sys.argv[1:]],
            say=_say,
            after_case=lambda results: write_report(results, out),
        )
    except OptionError:
        raise
    except ValueError as error:  # of the model's config.json
        raise OptionError(f"--model={options.model}: {error}") from error
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _interrupt)
    try:
        code = 0 if run.run() else SOME_FAILED
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print_table(run.results)
    print(f"{out / RESULTS}, {out / PAGE}")
    return code


def _report(paths: list[Path], values: Mapping[str, Any]) -> int:
    """Write one report of several runs."""
    if "cases" in values:
        raise OptionError(
            f"{' '.join(values['cases'])}: --report measures nothing; leave the cases out, or "
            "--report"
        )
    if unused := [flag(name) for name in values if name not in ("out", "json")]:
        raise OptionError(
            f"{', '.join(unused)}: no effect with --report, which measures nothing; leave it out"
        )
    results = merged(paths)
    out = Path(values.get("out") or _new_directory())
    make_outputs(out, values.get("json"))
    save_results(results, out, values.get("json"))
    write_report(results, out)
    print_table(results)
    print(f"{out / RESULTS}, {out / PAGE}")
    return 0


def _new_directory() -> str:
    return time.strftime("outputs/bench/%Y%m%d-%H%M%S")


def _say(line: str) -> None:
    print(line, flush=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
