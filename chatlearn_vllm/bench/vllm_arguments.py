"""Which engine arguments and sampling parameters do bare vLLM and VLLMModule share?

Both are made of the same job: VLLMModule reads it, bare vLLM gets what `engine_arguments` makes of
it, without what VLLMModule adds for its own purposes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from chatlearn_vllm.bench.measure import acceptance
from chatlearn_vllm.bench.options import DTYPES
from chatlearn_vllm.bench.workload import has_weights, model_config
from chatlearn_vllm.config import JobConfig, load_config
from chatlearn_vllm.config.engine_support import DRAFT_SAMPLE_METHODS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatlearn_vllm.bench.child import Task

ONLY_OF_MODULE = (
    "async_scheduling", "distributed_executor_backend", "disable_log_stats", "enable_sleep_mode",
    "logprobs_mode",
)  # fmt: skip
"""Engine arguments that VLLMModule sets for its job; bare vLLM runs with its own defaults."""
COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}


SETTINGS_OF = "models.policy.model_args."
"""What stands before the settings of a case, in the words of the job."""


def make_job(task: Task) -> JobConfig:
    """Write and read the job with a policy that does what the options and the case say.

    Raises:
        ConfigError: they break rules of a job.
    """
    options, case = task.options, task.case
    policy = {
        "load": str(task.model_dir),
        "load_format": "auto" if has_weights(task.model_dir) else "dummy",
        "dtype": DTYPES.get(options.dtype, "auto"),
        "seed": options.seed,
        "seq_length": options.seq_length,
        "max_new_tokens": options.max_tokens,
        "n": options.completions,
        "temperature": options.temperature,
        "ignore_eos": options.ignore_eos,
        "tensor_model_parallel_size": case.tensor_parallel_size,
        "pipeline_model_parallel_size": case.pipeline_parallel_size,
        "max_num_seqs": options.num_seqs,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enforce_eager": options.enforce_eager,
    }
    if options.max_model_len is not None:
        policy["max_model_len"] = options.max_model_len
    if options.max_num_batched_tokens is not None:
        policy["max_num_batched_tokens"] = options.max_num_batched_tokens
    if case.speculative:
        policy["speculative_config"] = speculative_config(task)
        policy["speculative_min_gain"] = 0  # what is measured is not to switch itself off
    (task.work_dir / "policy.yaml").write_text(yaml.safe_dump(policy))
    job = {
        "models": {"policy": {"num_gpu": case.num_gpus, "model_config_file": "policy.yaml"}},
        # Nothing is trained; the defaults of training need two samples or more.
        "runtime": {"sample_per_episode": options.num_completions, "train_micro_batch_size": 1},
    }
    path = task.work_dir / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return load_config(path, [SETTINGS_OF + setting for setting in case.settings])


def speculative_config(task: Task) -> dict[str, Any]:
    """For vLLM: the draft model that was given, else n-gram lookup."""
    options = task.options
    if options.draft is not None:
        # The kind of draft is read from its config.json.
        draft = str(Path(options.draft).resolve())
        config = {"model": draft, "num_speculative_tokens": options.num_speculative_tokens}
        if options.draft_sample_method != DRAFT_SAMPLE_METHODS[0]:
            config["draft_sample_method"] = options.draft_sample_method
        return config
    return {
        "method": "ngram",
        "num_speculative_tokens": options.num_speculative_tokens,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }


def bare_engine_arguments(
    task: Task, job: JobConfig, *, on_gpu: bool
) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments for `vllm.LLM`, and what of the options they cannot be."""
    from chatlearn_vllm.engines.vllm_arguments import engine_arguments
    from chatlearn_vllm.layouts import ModelShape

    case = task.case
    args = job.models["policy"].model_args
    shape = ModelShape.from_hf_config(model_config(task.model_dir))
    arguments, notices = engine_arguments(
        args, task.model_dir, shape, seed=args.seed, on_gpu=on_gpu
    )
    asked_for = {setting.partition("=")[0] for setting in case.settings}
    for name in set(ONLY_OF_MODULE) - asked_for:
        arguments.pop(name, None)
    if case.num_gpus > 1 and "distributed_executor_backend" not in asked_for:
        arguments["distributed_executor_backend"] = "mp"
    if case.logprobs and "logprobs_mode" not in asked_for:
        arguments["logprobs_mode"] = "processed_logprobs"
    # The counters of accepted tokens are part of the statistics.
    arguments["disable_log_stats"] = not (task.options.log_stats or case.speculative)
    # Nobody puts the engine to sleep here.
    return arguments, [notice for notice in notices if not notice.startswith("sleep mode")]


def speculation(job: JobConfig, metrics: Mapping[str, float]) -> dict[str, Any] | None:
    """What vLLM's counters say about drafts; None for a case without.

    `mean_accepted_length` counts the target's own token, as vLLM's log does.
    """
    config = job.models["policy"].model_args.speculative_config
    if config is None:
        return None
    return {
        "method": config["method"],
        "num_speculative_tokens": config["num_speculative_tokens"],
        **acceptance(**{name: metrics.get(counter, 0.0) for name, counter in COUNTERS.items()}),
    }
