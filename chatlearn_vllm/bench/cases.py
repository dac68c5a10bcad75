"""Which engines can be measured, and how does the command line name them?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from chatlearn_vllm.layouts import ModelShape

TRANSFORMERS = {
    "transformers": "eager",
    "transformers-sdpa": "sdpa",
    "transformers-flash": "flash_attention_2",
}
"""Attention implementation by engine."""
VLLM = ("vllm", "vllm-module")
ENGINES = (*TRANSFORMERS, *VLLM)
DEFAULT_CASES = ("transformers-sdpa", "vllm", "vllm-module")

_VARIANT = re.compile(r"(tp|pp)=(.*)")
_SETTING = re.compile(r"[a-z_]\w*(\.\w+)*=.*")
_GRAMMAR = "ENGINE[:tp=N][:pp=N][:speculative][:logprobs][:seeds][:KEY=VALUE]"


class OptionError(ValueError):
    """The benchmark cannot run as asked for; the message names option, value, rule and remedy."""


@dataclass(frozen=True)
class Case:
    """One engine in one form."""

    engine: str
    """One of ENGINES."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    speculative: bool = False
    """With speculative decoding."""
    logprobs: bool = False
    """Bare vLLM: return log-probabilities of the sampled tokens, as VLLMModule does."""
    seeds: bool = False
    """Bare vLLM: give each request a seed, as VLLMModule does with seed_per_response."""
    settings: tuple[str, ...] = ()
    """vLLM: further keys of the policy's yaml file, each `KEY=VALUE` with the value in yaml."""

    @property
    def is_vllm(self) -> bool:
        """Whether vLLM computes."""
        return self.engine in VLLM

    @property
    def num_gpus(self) -> int:
        """Ranks, each on a GPU of its own (on CPU: processes)."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_processes(self) -> int:
        """Processes to be started: VLLMModule has one per rank, the others start their own."""
        return self.num_gpus if self.engine == "vllm-module" else 1

    @property
    def comparable(self) -> tuple[Any, ...]:
        """Equal for cases that differ in the engine alone."""
        sizes = self.tensor_parallel_size, self.pipeline_parallel_size
        return (*sizes, self.speculative, sorted(self.settings))

    def __str__(self) -> str:
        parts = [self.engine]
        if self.tensor_parallel_size > 1:
            parts.append(f"tp={self.tensor_parallel_size}")
        if self.pipeline_parallel_size > 1:
            parts.append(f"pp={self.pipeline_parallel_size}")
        flags = ("speculative", "logprobs", "seeds")
        return ":".join([*parts, *(name for name in flags if getattr(self, name)), *self.settings])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"case": str(self), **asdict(self), "num_gpus": self.num_gpus}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Case:
        """Back from JSON, which may hold more, or come from a version that knew less."""
        known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        return cls(**{**known, "settings": tuple(known.get("settings", ()))})


def parse_case(
    text: str, *, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> Case:
    """Read a case such as `vllm:tp=2` or `vllm-module:speculative`.

    Args:
        text: as the user wrote it.
        tensor_parallel_size: of vLLM cases that name none.
        pipeline_parallel_size: likewise.

    Raises:
        OptionError: an unknown engine or variant.
    """
    engine, *variants = text.strip().split(":")
    if engine not in ENGINES:
        raise OptionError(f"case {text!r}: engine {engine!r} is not one of {', '.join(ENGINES)}")
    case = Case(engine)
    if case.is_vllm:
        case = replace(
            case,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
        )
    names = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size"}
    said = [variant.partition("=")[0] for variant in dict.fromkeys(variants)]
    if twice := next((key for key in said if said.count(key) > 1), None):
        raise OptionError(f"case {text!r}: {twice} has two values; keep one")
    for variant in variants:
        if match := _VARIANT.fullmatch(variant):
            key, number = match.groups()
            if not number.isdecimal() or int(number) < 1:
                raise OptionError(f"case {text!r}: {key}={number!r} must be a whole number >= 1")
            case = replace(case, **{names[key]: int(number)})
        elif variant in ("spec", "speculative"):
            case = replace(case, speculative=True)
        elif variant in ("logprobs", "seeds"):
            case = replace(case, **{variant: True})
        elif variant.endswith("="):
            raise OptionError(
                f"case {text!r}: {variant[:-1]} has no value; give one or take it off"
            )
        elif _SETTING.fullmatch(variant):
            case = replace(case, settings=(*case.settings, variant))
        else:
            raise OptionError(f"case {text!r}: unknown variant {variant!r}; cases are {_GRAMMAR}")
    if not case.is_vllm and case.num_gpus > 1:
        raise OptionError(
            f"case {text!r}: transformers runs on one GPU here; take tp and pp off, or measure vllm"
        )
    if case.engine != "vllm" and (case.logprobs or case.seeds):
        raise OptionError(
            f"case {text!r}: logprobs and seeds are variants of vllm; vllm-module has them as a "
            "job does"
        )
    if not case.is_vllm and case.settings:
        raise OptionError(
            f"case {text!r}: {case.settings[0]} would be a key of vLLM's; take it off, or measure "
            "vllm"
        )
    return case


def check_cases(cases: Sequence[Case], shape: ModelShape, num_gpus: int) -> None:
    """Check that the parallel sizes fit the model and this machine.

    Args:
        cases: all that were asked for.
        shape: sizes of the model.
        num_gpus: visible ones; 0 on a machine without, where ranks are processes.

    Raises:
        OptionError: one line for each rule that a case breaks.
    """
    problems = [problem for case in cases for problem in _problems(case, shape, num_gpus)]
    if problems:
        raise OptionError("\n".join(dict.fromkeys(problems)))


def _problems(case: Case, shape: ModelShape, num_gpus: int) -> list[str]:
    tp, pp = case.tensor_parallel_size, case.pipeline_parallel_size
    problems = []
    if num_gpus and num_gpus % tp:
        problems.append(
            f"{case}: tensor parallel size must divide the number of GPUs: {tp} does not divide "
            f"{num_gpus}; set VLLM_TENSOR_PARALLEL_SIZE (tp=) to {_divisors(num_gpus, shape)}, or "
            "CUDA_VISIBLE_DEVICES to a multiple of it"
        )
    elif num_gpus and num_gpus < case.num_gpus:
        problems.append(
            f"{case}: tensor x pipeline parallel size is {tp} x {pp} = {tp * pp}, more than the "
            f"{num_gpus} visible GPUs; lower one of them or run where there are more"
        )
    if shape.num_attention_heads % tp:
        problems.append(
            f"{case}: tensor parallel size {tp} must divide the model's "
            f"{shape.num_attention_heads} attention heads; set it to "
            f"{_divisors(shape.num_attention_heads, shape)}"
        )
    groups = shape.num_query_groups
    if groups % tp and tp % groups:
        problems.append(
            f"{case}: tensor parallel size {tp} must divide the model's {groups} key/value heads, "
            "or be a multiple of them"
        )
    if case.is_vllm and case.speculative and pp > 1:
        problems.append(
            f"{case}: drafts are made on the last pipeline stage only, and not with {pp} of them; "
            "take pp off and set a larger tp, or take speculative off"
        )
    if pp > shape.num_layers:
        problems.append(
            f"{case}: pipeline parallel size {pp} is more than the model's {shape.num_layers} "
            "layers; lower it"
        )
    return problems


def _divisors(number: int, shape: ModelShape) -> str:
    """Those tensor parallel sizes that divide a number and fit the model, as text."""
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    fitting = [
        str(n)
        for n in range(1, number + 1)
        if number % n == 0 and heads % n == 0 and (groups % n == 0 or n % groups == 0)
    ]
    return ", ".join(fitting[:-1]) + (" or " if fitting[:-1] else "") + fitting[-1]


def ratios(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Throughput of cases against those that they should be compared with.

    VLLMModule against each bare vLLM case of the same sizes; every vLLM case against the fastest
    transformers case.

    Args:
        results: of all cases, in the form of run.py.

    Returns:
        Dicts of `case`, `to` and `ratio`.
    """
    done = [(result, Case.from_dict(result)) for result in results if result["status"] == "ok"]

    def speed(result: Mapping[str, Any]) -> float:
        return result["throughput"]["output_tokens_per_s"]

    pairs = [
        (module, bare)
        for module, of_module in done
        for bare, of_bare in done
        if of_module.engine == "vllm-module" and of_bare.engine == "vllm"
        if of_module.comparable == of_bare.comparable
    ]
    plain = [result for result, case in done if not case.is_vllm]
    if plain:
        fastest = max(plain, key=speed)
        pairs += [(result, fastest) for result, case in done if case.is_vllm]
    return [
        {"case": one["case"], "to": other["case"], "ratio": speed(one) / speed(other)}
        for one, other in pairs
    ]
