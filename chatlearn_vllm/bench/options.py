"""What may a user ask of the benchmark, and with which defaults?"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from chatlearn_vllm.bench.cases import DEFAULT_CASES, Case, OptionError, parse_case

DTYPES = {"half": "float16", "float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}
"""What vLLM takes a dtype's name for."""
SHAPES = ("tiny", "1b", "8b")


def _option(default: Any, help_text: str, **settings: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **settings})


@dataclass(frozen=True)
class BenchOptions:
    """Options of `chatlearn-vllm bench`; each is a command line option of the same name."""

    cases: tuple[str, ...] = DEFAULT_CASES
    """As the user wrote them."""
    model: str | None = _option(None, "Hugging Face directory; without weights in it: random ones")
    shape: str = _option(
        "tiny", "Llama of this size with random weights, made on the spot; if no --model is given"
    )
    draft: str | None = _option(
        None, "draft model of speculative cases; without: n-gram lookup in the text so far"
    )
    num_speculative_tokens: int = _option(
        5, "tokens proposed per step", variable="VLLM_NUM_SPECULATIVE_TOKENS"
    )
    draft_sample_method: str = _option(
        "greedy",
        "vLLM: how --draft proposes tokens: greedy, or probabilistic = drawn at the temperature",
    )
    dtype: str = _option(
        "auto",
        "half, float16, bfloat16 or float32; auto: bfloat16, on CPU float32",
        variable="VLLM_DTYPE",
    )
    prompts: int = _option(64, "prompts per pass")
    completions: int = _option(16, "completions per prompt")
    prompt_tokens: int = _option(128, "tokens per prompt")
    max_tokens: int = _option(512, "most tokens of a completion")
    prompt_file: str | None = _option(
        None, "jsonl with `prompt`, for prompts of text; without: random token ids"
    )
    ignore_eos: bool = _option(False, "go on after the end-of-sequence token")
    temperature: float = _option(1.0, "of sampling; 0 = greedy, with one completion per prompt")
    seed: int = _option(42, "of prompts, weights and sampling")
    repeat: int = _option(3, "measured passes per case, each over other prompts; median counts")
    rounds: int = _option(1, "times that all cases are gone through, in new processes")
    warmup: int = _option(1, "passes before them that do not count")
    latency_requests: int = _option(4, "requests measured one at a time; 0 = no latencies")
    tensor_parallel_size: int = _option(
        1, "of vLLM cases without tp=", variable="VLLM_TENSOR_PARALLEL_SIZE"
    )
    pipeline_parallel_size: int = _option(1, "of vLLM cases without pp=")
    gpu_memory_utilization: float = _option(
        0.9,
        "vLLM: share of a GPU's memory, in (0, 1]",
        variable="VLLM_GPU_MEMORY_UTILIZATION",
    )
    max_model_len: int | None = _option(
        None,
        "vLLM: longest sequence; without: prompt and completion",
        variable="VLLM_MAX_MODEL_LEN",
    )
    max_num_seqs: int | None = _option(
        None,
        "vLLM: sequences decoded at once; without: all completions, at most 1024",
        variable="VLLM_MAX_NUM_SEQS",
    )
    max_num_batched_tokens: int | None = _option(
        None, "vLLM: tokens per step; without: its choice", variable="VLLM_MAX_NUM_BATCHED_TOKENS"
    )
    enforce_eager: bool = _option(False, "vLLM: no compilation and CUDA graphs")
    log_stats: bool = _option(False, "bare vLLM: keep its statistics; speculative cases always do")
    hf_batch_size: str = _option(
        "auto", "transformers: sequences per generate(), or auto: its own best size"
    )
    hf_search_seconds: float = _option(240.0, "transformers: bound on the search for that size")
    case_timeout: float = _option(1200.0, "seconds after which a case is ended")
    out: str | None = _option(None, "directory of results; without: outputs/bench/TIME")
    json: str | None = _option(None, "write the results to this file, too")
    notices: tuple[str, ...] = ()
    """What of the environment has no effect here, and why."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> BenchOptions:
        """Check values that were given; the others take their defaults.

        Raises:
            OptionError: one line for each value that breaks a rule.
        """
        options = cls(**given)
        problems = list(options._problems())
        if problems:
            raise OptionError("\n".join(problems))
        return options

    def _problems(self) -> Any:
        # Not for `--help`, which is to answer at once.
        from chatlearn_vllm.config.engine_support import DRAFT_SAMPLE_METHODS

        at_least = {
            1: (
                "prompts", "completions", "prompt_tokens", "max_tokens", "repeat", "rounds",
                "num_speculative_tokens", "tensor_parallel_size", "pipeline_parallel_size",
                "max_model_len", "max_num_seqs", "max_num_batched_tokens",
            ),
            0: ("warmup", "latency_requests", "temperature", "seed", "hf_search_seconds"),
        }  # fmt: skip
        for name in ("temperature", "hf_search_seconds", "case_timeout"):
            value = getattr(self, name)
            if not math.isfinite(value):
                yield f"{flag(name)}={value} must be a finite number"
        if self.draft_sample_method not in DRAFT_SAMPLE_METHODS:
            yield (
                f"--draft-sample-method={self.draft_sample_method} must be one of "
                f"{', '.join(DRAFT_SAMPLE_METHODS)}"
            )
        if self.case_timeout <= 0:
            yield f"--case-timeout={self.case_timeout} must be more than 0"
        if self.seed >= 2**31:
            yield f"--seed={self.seed} must be less than {2**31}"
        for least, names in at_least.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    yield f"{named(name)}={value} must be at least {least}"
        if not 0 < self.gpu_memory_utilization <= 1:
            name = named("gpu_memory_utilization")
            yield f"{name}={self.gpu_memory_utilization} must be in (0, 1]"
        if self.dtype not in ("auto", *DTYPES):
            yield f"{named('dtype')}={self.dtype!r} must be one of auto, {', '.join(DTYPES)}"
        if self.model is None and self.shape not in SHAPES:
            yield f"--shape={self.shape!r} must be one of {', '.join(SHAPES)}"
        if self.hf_batch_size != "auto" and not (
            self.hf_batch_size.isdecimal() and int(self.hf_batch_size) > 0
        ):
            yield f"--hf-batch-size={self.hf_batch_size!r} must be auto or a whole number >= 1"
        if self.max_model_len and self.max_model_len < self.prompt_tokens + self.max_tokens:
            yield (
                f"{named('max_model_len')}={self.max_model_len} has no room for "
                f"--prompt-tokens={self.prompt_tokens} and --max-tokens={self.max_tokens}; raise "
                "it or lower one of them"
            )
        budget = self.max_num_batched_tokens
        is_vllm = any(text.startswith("vllm") for text in self.cases)
        if is_vllm and budget is not None and 0 < budget < self.num_seqs:
            yield (
                f"{named('max_num_batched_tokens')}={budget} must be at least "
                f"{named('max_num_seqs')}={self.num_seqs}, one token per running sequence; raise "
                "it or lower that"
            )
        if self.temperature == 0 and self.completions > 1:
            yield (
                f"--temperature=0 with --completions={self.completions}: greedy completions of a "
                "prompt are all equal; set --completions 1"
            )
        for name in ("model", "draft"):
            value = getattr(self, name)
            if value is not None and not Path(value, "config.json").is_file():
                yield f"{flag(name)}={value}: no config.json there; give a Hugging Face directory"
        if self.prompt_file is not None and not Path(self.prompt_file).is_file():
            is_there = Path(self.prompt_file).is_dir()
            why = "is a directory; name a file in it" if is_there else "no such file"
            yield f"--prompt-file={self.prompt_file}: {why}"
        if self.prompt_file is not None and self.model is None:
            yield "--prompt-file needs --model: a made model's tokenizer knows no words"

    def parsed_cases(self) -> list[Case]:
        """What is to be measured, each once, in the order given.

        Raises:
            OptionError: one line for each case that cannot be read.
        """
        sizes = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
        }
        cases: list[Case] = []
        problems: list[str] = []
        for text in self.cases:
            try:
                cases.append(parse_case(text, **sizes))
            except OptionError as error:
                problems.append(str(error))
        if problems:
            raise OptionError("\n".join(problems))
        return list(dict.fromkeys(cases))

    @property
    def num_completions(self) -> int:
        """Of one pass."""
        return self.prompts * self.completions

    @property
    def seq_length(self) -> int:
        """Longest sequence of vLLM engines, in tokens."""
        return self.max_model_len or self.prompt_tokens + self.max_tokens

    @property
    def num_seqs(self) -> int:
        """Sequences that vLLM decodes at once."""
        return self.max_num_seqs or min(1024, self.num_completions)

    def torch_dtype_name(self, *, on_gpu: bool) -> str:
        """The type that weights and activations have."""
        if not on_gpu:
            return "float32"
        return DTYPES.get(self.dtype, "bfloat16")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchOptions:
        """Back from JSON."""
        tuples = {name: tuple(values[name]) for name in ("cases", "notices")}
        return cls(**{**values, **tuples})


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Give a parser all options; those that are not given leave no value."""
    command.add_argument(
        "cases",
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="CASE",
        help="transformers[-sdpa|-flash], vllm, vllm-module with variants, as in vllm:tp=2:pp=2, "
        f"vllm-module:speculative, vllm:logprobs:seeds; default: {' '.join(DEFAULT_CASES)}",
    )
    command.add_argument(
        "--report",
        nargs="+",
        default=(),
        metavar="RESULTS.json",
        help="measure nothing; make one report of several runs, as of different numbers of GPUs",
    )
    command.add_argument(
        "--from-environment",
        action="store_true",
        help="read the variables of run_benchmark.sh; options given here win",
    )
    for one in fields(BenchOptions):
        if not one.metadata:
            continue
        shown = "" if one.default in (None, False) else f" (default: {one.default})"
        kind = _KINDS[one.type.removesuffix(" | None")]
        settings = {"action": "store_true"} if kind is bool else {"type": kind}
        command.add_argument(
            flag(one.name),
            dest=one.name,
            default=argparse.SUPPRESS,
            help=one.metadata["help"] + shown,
            **settings,
        )


_KINDS = {"str": str, "int": int, "float": float, "bool": bool}


def flag(name: str) -> str:
    """An option as a user writes it."""
    return "--" + name.replace("_", "-")


def named(name: str) -> str:
    """Option and environment variable of a field, as a user knows them."""
    variable = BenchOptions.__dataclass_fields__[name].metadata.get("variable")
    return flag(name) + (f" ({variable})" if variable else "")
