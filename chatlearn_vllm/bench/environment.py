"""What do the variables of run_benchmark.sh ask for?"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from chatlearn_vllm.bench.cases import TRANSFORMERS, VLLM, OptionError
from chatlearn_vllm.bench.options import BenchOptions

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")

_ALIKE, _ALIKE_BEGIN = 0.82, 0.6
"""From which similarity on a variable may be a misspelt one; vLLM's own VLLM_* variables resemble
those read here by less than the first."""

NUMBERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    one.metadata["variable"]: (one.name, float if one.type == "float" else int)
    for one in fields(BenchOptions)
    if "variable" in one.metadata and one.name not in ("dtype", "num_speculative_tokens")
}
"""Option and type by variable."""

VARIABLES = (
    "INFERENCE_ENGINE", "INFERENCE_METHOD", *NUMBERS, "VLLM_DISABLE_LOG_STATS", "VLLM_DTYPE",
    "VLLM_ENABLE_SPECULATIVE", "VLLM_NUM_SPECULATIVE_TOKENS", "GAMMA_VALUE",
    "VLLM_USE_V2_BLOCK_MANAGER", "ENABLE_BATCH",
)  # fmt: skip
"""All that are read. vLLM warns about VLLM_* variables that it does not know, so the processes that
run it are started without these."""


def options_from_environment(
    environ: Mapping[str, str], cases: Sequence[str] | None = None
) -> dict[str, Any]:
    """Translate the variables that are set into options.

    Args:
        environ: of the process.
        cases: that were given otherwise, in place of INFERENCE_ENGINE's; what the other variables
            say of cases is said of these.

    Returns:
        Values for `BenchOptions`; `notices` says what has no effect.

    Raises:
        OptionError: one line for each variable with a value it cannot have.
    """
    problems: list[str] = []
    notices: list[str] = []
    options: dict[str, Any] = {}

    def number(variable: str, kind: Callable[[str], Any]) -> Any:
        text = environ.get(variable, "").strip()
        if text in ("", "None"):
            return None
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            problems.append(f"{variable}={text!r} must be {what}")
            return None

    def flag(variable: str, default: bool) -> bool:
        text = environ.get(variable, "").strip()
        if not text:
            return default
        if text.lower() not in (*_TRUE, *_FALSE):
            problems.append(f"{variable}={text!r} must be true or false")
        return text.lower() in _TRUE

    for variable, (name, kind) in NUMBERS.items():
        if (value := number(variable, kind)) is not None:
            options[name] = value
    if environ.get("VLLM_DTYPE"):
        options["dtype"] = environ["VLLM_DTYPE"]
    options["log_stats"] = not flag("VLLM_DISABLE_LOG_STATS", True)
    gamma = number("GAMMA_VALUE", int)
    tokens = number("VLLM_NUM_SPECULATIVE_TOKENS", int)
    if tokens is None and gamma is not None and gamma < 1:
        problems.append(f"GAMMA_VALUE={gamma} must be at least 1")
    if tokens is not None or gamma is not None:
        options["num_speculative_tokens"] = gamma if tokens is None else tokens

    method = environ.get("INFERENCE_METHOD", "target_ar")
    if method not in ("target_ar", "speculative"):
        problems.append(f"INFERENCE_METHOD={method!r} must be target_ar or speculative")
    wants_vllm_drafts = flag("VLLM_ENABLE_SPECULATIVE", method == "speculative")
    engines = cases
    if engines is None:
        engines = environ.get("INFERENCE_ENGINE", "transformers").replace(",", " ").split()
    made = []
    batches = flag("ENABLE_BATCH", True)
    for engine in engines:
        name, *variants = engine.split(":")
        if cases is None and name not in (*TRANSFORMERS, *VLLM):
            problems.append(
                f"INFERENCE_ENGINE={engine!r} must be of {', '.join((*TRANSFORMERS, *VLLM))}"
            )
        is_speculative = method == "speculative" and (name in TRANSFORMERS or wants_vllm_drafts)
        has_said_so = not {"spec", "speculative"}.isdisjoint(variants)
        made.append(f"{engine}:speculative" if is_speculative and not has_said_so else engine)
        if name in VLLM and method == "speculative" and not wants_vllm_drafts:
            notices.append(
                "INFERENCE_METHOD=speculative has no effect on vLLM with "
                f"VLLM_ENABLE_SPECULATIVE={environ['VLLM_ENABLE_SPECULATIVE']}: measured without "
                "speculative decoding"
            )
        if name in VLLM and method != "speculative" and wants_vllm_drafts:
            notices.append(
                "VLLM_ENABLE_SPECULATIVE=true has no effect without INFERENCE_METHOD=speculative"
            )
        if name in VLLM and "ENABLE_BATCH" in environ:
            notices.append("ENABLE_BATCH has no effect on vLLM: it batches continuously")
        if name in TRANSFORMERS and not batches:
            options["hf_batch_size"] = "1"
    if not made:
        problems.append(
            f"INFERENCE_ENGINE={environ['INFERENCE_ENGINE']!r} must name an engine, of "
            f"{', '.join((*TRANSFORMERS, *VLLM))}"
        )
    options["cases"] = tuple(made)
    if "VLLM_USE_V2_BLOCK_MANAGER" in environ:
        notices.append(
            "VLLM_USE_V2_BLOCK_MANAGER has no effect: vLLM's V1 engine has one block manager"
        )
    notices += _misspelt(environ)
    if problems:
        raise OptionError("\n".join(dict.fromkeys(problems)))
    options["notices"] = tuple(dict.fromkeys(notices))
    return options


def _misspelt(environ: Mapping[str, str]) -> list[str]:
    """Variables that nobody reads and that are nearly called as one that is read."""
    notices = []
    for name in sorted(environ.keys() - set(VARIABLES)):
        alike = _ALIKE if name.startswith("VLLM_") else _ALIKE_BEGIN
        if name.startswith(("VLLM_", "GAMMA")) and (
            nearest := difflib.get_close_matches(name, VARIABLES, n=1, cutoff=alike)
        ):
            notices.append(f"{name}={environ[name]} is not read here; did you mean {nearest[0]}?")
    return notices


def without_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for processes that run an engine."""
    return {name: value for name, value in environ.items() if name not in VARIABLES}
