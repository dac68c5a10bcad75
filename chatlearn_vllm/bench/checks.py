"""What of model, draft, prompts and options cannot be measured, seen before an engine starts?"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chatlearn_vllm.bench.cases import Case, OptionError
from chatlearn_vllm.bench.child import Task
from chatlearn_vllm.bench.options import BenchOptions, named
from chatlearn_vllm.bench.vllm_arguments import SETTINGS_OF, make_job
from chatlearn_vllm.bench.workload import (
    NUM_SPECIAL,
    has_tokenizer,
    has_weights,
    num_prompts_needed,
)
from chatlearn_vllm.config import ConfigError
from chatlearn_vllm.config.engine_support import DRAFT_SAMPLE_METHODS
from chatlearn_vllm.config.model_files import longest_sequence, read_json_object
from chatlearn_vllm.config.upstream_fields import upstream_fields

_OPTIONS = {
    "load": "model", "max_new_tokens": "max_tokens", "n": "completions",
    "speculative_config.model": "draft",
    "speculative_config.num_speculative_tokens": "num_speculative_tokens",
    "speculative_config.draft_sample_method": "draft_sample_method",
}  # fmt: skip
"""Option by key of a job."""
_HAVE_OPTIONS = {
    "model": "--model", "dtype": "--dtype", "seed": "--seed", "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs", "max_num_batched_tokens": "--max-num-batched-tokens",
    "gpu_memory_utilization": "--gpu-memory-utilization", "enforce_eager": "--enforce-eager",
    "disable_log_stats": "--log-stats", "tensor_parallel_size": "tp=N",
    "pipeline_parallel_size": "pp=N", "speculative_config": "speculative_config.FIELD",
    "speculative_config.model": "--draft",
    "speculative_config.num_speculative_tokens": "--num-speculative-tokens",
    "speculative_config.draft_sample_method": "--draft-sample-method",
}  # fmt: skip
"""What is used for an engine argument instead of a setting of a case."""
_KEY_TO_SET = re.compile(r", or set \w+: .* in speculative_config$")
"""The end of a rule that names a key which the benchmark has no option for."""


def check_workload(
    options: BenchOptions, cases: Sequence[Case], config: Mapping[str, Any]
) -> list[str]:
    """Check all that files and options say.

    Args:
        options: what was asked for.
        cases: of the options.
        config: the model's config.json.

    Returns:
        Notices: what makes numbers others than they seem.

    Raises:
        OptionError: one line for each rule that is broken.
    """
    problems = [
        *_model_problems(options, cases, config),
        *_length_problems(options, cases, config),
        *_draft_problems(options, cases, config),
        *_setting_problems(cases),
    ]
    texts: list[str] = []
    if options.prompt_file is not None:
        try:
            texts = _prompts_of(options.prompt_file)
        except ValueError as error:
            problems.append(f"--prompt-file={options.prompt_file}: {error}")
        else:
            problems += _prompt_problems(options, texts)
    # Rules of the job say less clearly what is said above.
    if problems := problems or _job_problems(options, cases, config):
        raise OptionError("\n".join(dict.fromkeys(problems)))
    return [*_prompt_notices(options, cases, texts), *_effectless(options, cases)]


def _model_problems(
    options: BenchOptions, cases: Sequence[Case], config: Mapping[str, Any]
) -> Iterator[str]:
    if options.model is None:
        return
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and not has_weights(Path(options.model)):
        yield (
            f"--model={options.model}: config.json says that the weights are quantised ({method}), "
            "but there are none, and random ones are not; give a directory with weights"
        )
    readers = [str(case) for case in cases if case.is_vllm]
    readers += ["--prompt-file"] if options.prompt_file is not None else []
    if readers and not has_tokenizer(Path(options.model)):
        yield (
            f"--model={options.model}: no tokenizer there, without which {', '.join(readers)} "
            "cannot be; copy one into it"
        )
    if options.prompt_file is None and config["vocab_size"] <= NUM_SPECIAL:
        yield (
            f"--model={options.model}: config.json says vocab_size={config['vocab_size']}, but "
            f"prompts are of random token ids from {NUM_SPECIAL} on; give a model with more"
        )


def _length_problems(
    options: BenchOptions, cases: Sequence[Case], config: Mapping[str, Any]
) -> Iterator[str]:
    longest = _longest_sequence(options, config)
    if longest is None:
        return
    where = f"the {longest} positions of --model={options.model}"
    if options.prompt_tokens + options.max_tokens > longest:
        yield (
            f"--prompt-tokens={options.prompt_tokens} and --max-tokens={options.max_tokens} are "
            f"together more than {where}; lower one of them"
        )
    elif options.seq_length > longest and any(case.is_vllm for case in cases):
        yield (
            f"{named('max_model_len')}={options.max_model_len} is more than {where}; lower it to "
            "at most that"
        )


def _longest_sequence(options: BenchOptions, config: Mapping[str, Any]) -> int | None:
    """Tokens that the model has positions for, as vLLM counts them; None where nothing says so."""
    if options.model is None or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") != "0":
        return None
    return longest_sequence(config)


def _draft_problems(
    options: BenchOptions, cases: Sequence[Case], config: Mapping[str, Any]
) -> Iterator[str]:
    speculative = [case for case in cases if case.speculative]
    if options.draft is None or not speculative:
        return
    if not has_weights(Path(options.draft)):
        yield (
            f"--draft={options.draft}: no weights there, and a draft of random ones agrees with no "
            "model; give a directory with weights, or leave --draft out for n-gram lookup"
        )
    try:
        own = read_json_object(Path(options.draft, "config.json")).get("vocab_size")
    except ConfigError as error:
        yield f"--draft={options.draft}: {error.problems[0].rule}"
        return
    if own not in (None, config["vocab_size"]) and not all(case.is_vllm for case in speculative):
        yield (
            f"--draft={options.draft}: drafts from a vocabulary of {own} tokens, the model has "
            f"{config['vocab_size']}; take a draft with the model's tokenizer"
        )


def _setting_problems(cases: Sequence[Case]) -> Iterator[str]:
    arguments = upstream_fields()["engine_args"]
    for case, setting in ((one, setting) for one in cases for setting in one.settings):
        key = setting.partition("=")[0]
        name = key.partition(".")[0]
        if key in _HAVE_OPTIONS:
            yield f"{case}: {key} has a place of its own; use {_HAVE_OPTIONS[key]}"
        elif find_spec("vllm") is not None and name not in arguments:
            nearest = difflib.get_close_matches(name, sorted(arguments), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            yield f"{case}: {name} must be an engine argument of vLLM{hint}"
        elif name == "speculative_config" and not case.speculative:
            yield f"{case}: {key} has no effect without speculative; add it to the case"


def _prompts_of(path: str) -> list[str]:
    from chatlearn_vllm.data.prompts import load_prompts

    return [record["prompt"] for record in load_prompts(path)]


def _prompt_problems(options: BenchOptions, texts: Sequence[str]) -> Iterator[str]:
    if len(texts) < options.prompts:
        yield (
            f"--prompt-file={options.prompt_file} holds {len(texts)} prompts, fewer than "
            f"--prompts={options.prompts}; lower the latter"
        )
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            yield (
                f"--prompt-file={options.prompt_file}: prompt {number} has {half}, half of a "
                "character, which no tokenizer reads; write the whole character, or leave it out"
            )


def _prompt_notices(
    options: BenchOptions, cases: Sequence[Case], texts: Sequence[str]
) -> list[str]:
    needed, different = num_prompts_needed(options), len(set(texts))
    if options.prompt_file is None or different >= needed or not any(c.is_vllm for c in cases):
        return []
    return [
        f"--prompt-file={options.prompt_file} holds {different} different prompts, all passes take "
        f"{needed}: it is read again from its start, and vLLM finds prompts in its prefix cache, "
        "which makes it faster than with new ones; give more prompts, or lower --prompts, "
        "--repeat or --warmup"
    ]


def _effectless(options: BenchOptions, cases: Sequence[Case]) -> list[str]:
    """What was asked for and changes nothing."""
    notices = []
    if again := [text for text in dict.fromkeys(options.cases) if options.cases.count(text) > 1]:
        notices.append(f"{', '.join(again)}: asked for more than once, measured once; see --rounds")
    if options.hf_batch_size != "auto" and all(case.is_vllm for case in cases):
        notices.append(
            f"--hf-batch-size={options.hf_batch_size} has no effect without a transformers case"
        )
    if options.draft is not None and not any(case.speculative for case in cases):
        notices.append(
            f"--draft={options.draft} has no effect without a case with :speculative, as in "
            f"{cases[0].engine}:speculative"
        )
    method = options.draft_sample_method
    if method != DRAFT_SAMPLE_METHODS[0] and (
        options.draft is None or not any(case.speculative and case.is_vllm for case in cases)
    ):
        notices.append(
            f"--draft-sample-method={method} has no effect without --draft and a vLLM case with "
            ":speculative"
        )
    return notices


def _job_problems(
    options: BenchOptions, cases: Sequence[Case], config: Mapping[str, Any]
) -> list[str]:
    """What the job of some vLLM case breaks, in words of the options."""
    problems = []
    with tempfile.TemporaryDirectory(prefix="chatlearn-bench-") as scratch:
        directory = Path(scratch) if options.model is None else Path(options.model).resolve()
        if options.model is None:
            Path(scratch, "config.json").write_text(json.dumps(config))
        for case in (case for case in cases if case.is_vllm):
            try:
                make_job(Task(case, options, directory, Path(scratch), Path(scratch, "events")))
            except ConfigError as error:
                for problem in error.problems:
                    where = _in_options(problem.key, options, case)
                    problems.append(f"{where}: {_KEY_TO_SET.sub('', problem.rule)}")
    return problems


def _in_options(key: str, options: BenchOptions, case: Case) -> str:
    """An option with its value, or the case, as a user knows them, for a key of the job."""
    key = key.removeprefix(SETTINGS_OF)
    name = _OPTIONS.get(key, key)
    if name in BenchOptions.__dataclass_fields__:
        return f"{named(name)}={getattr(options, name)}"
    return f"{case}: {key}" if case.settings else key
