"""How do the results of several runs become those of one, and which may?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from chatlearn_vllm.bench.cases import OptionError, ratios
from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.report import page
from chatlearn_vllm.bench.run import FORMAT

_WORKLOAD = (
    "prompts", "completions", "prompt_tokens", "max_tokens", "prompt_file", "ignore_eos",
    "temperature", "seed",
)  # fmt: skip
_OF_VLLM = ("max_num_batched_tokens", "enforce_eager")
_OF_DRAFTS = ("draft", "num_speculative_tokens", "draft_sample_method")

Results = dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """One file of results, and what of it must be equal in runs that are compared, by name."""

    path: Path
    results: Results
    workload: dict[str, Any]
    weights: dict[str, Any]
    """Whether the model had any; results of earlier versions do not say."""
    engine: dict[str, Any]
    """In runs that measured vLLM."""
    drafts: dict[str, Any]
    """In runs with speculative decoding."""

    @classmethod
    def of(cls, path: Path, results: Results) -> _Run:
        """Look at whatever is needed of results."""
        known = {one.name for one in fields(BenchOptions)}
        given = {name: value for name, value in results["options"].items() if name in known}
        options = BenchOptions.from_dict(given)
        machine, model = results["machine"], results["model"]
        gpus = sorted({gpu["name"] for gpu in machine["gpus"]})
        return cls(
            path,
            results,
            workload={
                "device": ", ".join(gpus) or machine["cpu"],
                "dtype": options.torch_dtype_name(on_gpu=bool(gpus)),
                **{name: getattr(options, name) for name in _WORKLOAD},
                "model": model["config"],
            },
            weights={"weights of the model": model.get("has_weights")},
            engine={
                "max_num_seqs": options.num_seqs,
                "max_model_len": options.seq_length,
                **{name: getattr(options, name) for name in _OF_VLLM},
            },
            drafts={name: getattr(options, name) for name in _OF_DRAFTS},
        )

    def measured(self, is_wanted: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Whether there is such a case among those that went well."""
        return any(case["status"] == "ok" and is_wanted(case) for case in self.results["cases"])


def merged(paths: Sequence[Path]) -> Results:
    """The results of several runs with the same model and workload as those of one.

    Of a case in several runs the last one counts that went well.

    Raises:
        OptionError: a file holds no results, or those of another workload or device.
    """
    runs = [_read(path) for path in paths]
    _check_equal(runs, lambda run: run.workload)
    _check_equal(
        [run for run in runs if run.weights["weights of the model"] is not None],
        lambda run: run.weights,
    )
    of_vllm = [run for run in runs if run.measured(lambda case: case["engine"].startswith("vllm"))]
    _check_equal(of_vllm, lambda run: run.engine)
    with_drafts = [run for run in runs if run.measured(lambda case: case["speculative"])]
    _check_equal(with_drafts, lambda run: run.drafts)

    cases: dict[str, dict[str, Any]] = {}
    for case in (case for run in runs for case in run.results["cases"]):
        name = case["case"]
        if name not in cases or case["status"] == "ok" or cases[name]["status"] != "ok":
            cases[name] = case
    notices = dict.fromkeys(notice for run in runs for notice in run.results["notices"])
    return {
        **runs[0].results,
        "cases": list(cases.values()),
        "ratios": ratios(list(cases.values())),
        "notices": list(notices),
        "machine": max((run.results["machine"] for run in runs), key=lambda one: len(one["gpus"])),
    }


def _check_equal(runs: Sequence[_Run], values: Callable[[_Run], dict[str, Any]]) -> None:
    """Refuse runs of which some value differs from the first one's."""
    for run in runs[1:]:
        own, first = values(run), values(runs[0])
        different = [
            f"{name} ({own[name]}, not {first[name]})" if name != "model" else name
            for name in own
            if own[name] != first[name]
        ]
        if different:
            raise OptionError(
                f"--report {run.path}: another {', '.join(different)} than in {runs[0].path}; only "
                "runs of the same workload on the same kind of device can be compared"
            )


def _read(path: Path) -> _Run:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"--report {path}: cannot be read: {error}") from error
    rule = "no results of this version; measure again"
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise OptionError(f"--report {path}: {rule}")
    try:
        run = _Run.of(path, results)
        # The report will read the rest.
        page({**results, "ratios": ratios(results["cases"])}, plots=[])
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"
        raise OptionError(f"--report {path}: {rule} (it is not whole: {what})") from error
    return run
