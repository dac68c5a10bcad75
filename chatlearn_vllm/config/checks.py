"""Which rules hold between the keys of a job, and what should its user be told before it starts?"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from chatlearn_vllm.config.accepted_args import (
    LoggingArgs,
    MegatronArgs,
    RetiredArgs,
    UnusedArgs,
)
from chatlearn_vllm.config.beam_checks import beam_problems
from chatlearn_vllm.config.device_checks import check_device_mappings, check_replicas
from chatlearn_vllm.config.engine_checks import check_draft_directory, check_engine
from chatlearn_vllm.config.engine_notices import without_effect
from chatlearn_vllm.config.idle_keys import idle_adapter_keys, idle_runtime_keys
from chatlearn_vllm.config.megatron_fields import idle_fields, megatron_problems
from chatlearn_vllm.config.model_args import DTYPE_OF_FLAG
from chatlearn_vllm.config.model_files import read_config_json
from chatlearn_vllm.config.package_checks import missing_packages
from chatlearn_vllm.config.parallel_checks import (
    check_experts,
    check_layers,
    sizes_that_divide,
)
from chatlearn_vllm.config.problems import Key
from chatlearn_vllm.config.sampling import changed_sampling
from chatlearn_vllm.config.schema import JobConfig, ModelConfig, RuntimeConfig, UnusedRuntimeKeys
from chatlearn_vllm.config.section import Section
from chatlearn_vllm.config.server_checks import server_problems
from chatlearn_vllm.config.transformers_checks import transformers_problems

_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
}
"""Our key of a model's structure -> its key in config.json."""


class Reporter(Protocol):
    """Collects broken rules."""

    def require(self, holds: bool, key: Key, rule: str, *, given: Sequence[Key] = ()) -> None:
        """Report `rule` for the value at `key`, unless it or a key of `given` is already wrong."""


def check_job(job: JobConfig, report: Reporter, *, check_files: bool) -> None:
    """Check every rule between keys.

    Args:
        report: told of every broken rule.
        check_files: also require the files and directories that the job will read.
    """
    report.require(bool(job.models), ("models",), "a job needs at least one model")
    for model in job.models.values():
        _check_devices(model, report)
        _check_unsupported(model, report)
        _check_lengths_and_types(model, report)
        _check_recomputation(model, report)
        _check_parallel(model, report)
        _check_against_config_json(model, report)
        _check_batches(model, job.runtime, report)
        check_engine(model, job.runtime, report)
        for key, rule in beam_problems(model, job.runtime):
            report.require(False, key, rule)
    _check_runtime(job.runtime, report)
    _check_colocation(job, report)
    _check_saves(job, report)
    check_device_mappings(job, report)
    if check_files:
        _check_files(job, report)


def _check_devices(model: ModelConfig, report: Reporter) -> None:
    at: Key = ("models", model.name)
    num_gpu, num_cpu = (*at, "num_gpu"), (*at, "num_cpu")
    sizes = [(*at, "tensor_model_parallel_size"), (*at, "pipeline_model_parallel_size")]
    sizes += [(*at, "model_args", size[-1]) for size in sizes]

    report.require(
        (model.num_gpu > 0) != (model.num_cpu > 0),
        num_gpu,
        "a model has either num_gpu > 0 or, without devices, num_cpu > 0",
        given=[num_cpu, (*at, "device_mapping")],
    )
    divides = check_replicas(model, report)
    report.require(
        model.num_cpu % model.cpu_per_process == 0,
        num_cpu,
        f"must be a multiple of cpu_per_process={model.cpu_per_process}",
    )
    report.require(
        model.num_gpu > 0 or not model.trainable,
        (*at, "trainable"),
        "a trainable model needs num_gpu > 0",
        given=[num_gpu],
    )
    report.require(
        model.expected_num_replica in (None, model.num_replica) or not divides,
        (*at, "num_replica"),
        f"follows from the devices and parallel sizes, which give {model.num_replica}",
        given=[num_gpu, num_cpu, *sizes],
    )


def _check_unsupported(model: ModelConfig, report: Reporter) -> None:
    at: Key = ("models", model.name)
    for name in ("gpu_per_process", "zero_size", "fsdp_size", "sp_size"):
        report.require(getattr(model, name) == 1, (*at, name), "must be 1, others have no backend")
    report.require(
        not model.lora.enable_lora,
        (*at, "lora", "enable_lora"),
        "must be False; adapters are switched on by lora_r in the model's file",
    )
    report.require(
        model.model_args.lora_dropout == 0,
        (*at, "model_args", "lora_dropout"),
        "must be 0, with dropout the trainer would not score tokens as the rollout sampled them",
    )
    for key, rule in (*transformers_problems(model), *server_problems(model)):
        report.require(False, key, rule)
    report.require(
        model.model_args.apply_replica_id_to_seed,
        (*at, "model_args", "apply_replica_id_to_seed"),
        "must be True, replicas with equal seeds would give equal samples",
    )


def _check_lengths_and_types(model: ModelConfig, report: Reporter) -> None:
    args, at = model.model_args, ("models", model.name, "model_args")
    report.require(
        args.max_new_tokens < args.seq_length,
        (*at, "max_new_tokens"),
        f"must be less than seq_length={args.seq_length}, the prompt needs room too; raise "
        "seq_length",
        given=[(*at, "seq_length")],
    )
    report.require(
        args.max_num_batched_tokens is None or args.max_num_batched_tokens >= args.max_num_seqs,
        (*at, "max_num_batched_tokens"),
        f"must be at least max_num_seqs={args.max_num_seqs}, one token per running sequence",
        given=[(*at, "max_num_seqs")],
    )
    max_model_len = args.engine_args.get("max_model_len", args.seq_length)
    report.require(
        type(max_model_len) is int and max_model_len >= args.seq_length,
        (*at, "max_model_len"),
        f"must be at least seq_length={args.seq_length}, prompt and response together",
        given=[(*at, "seq_length")],
    )
    max_tokens = args.max_tokens_per_micro_batch
    report.require(
        max_tokens is None or max_tokens >= args.seq_length,
        (*at, "max_tokens_per_micro_batch"),
        f"must be at least seq_length={args.seq_length}: a sequence is not cut",
        given=[(*at, "seq_length")],
    )
    report.require(
        args.lr_decay_iters is None or args.lr_decay_iters > args.lr_warmup_iters,
        (*at, "lr_decay_iters"),
        f"must be more than lr_warmup_iters={args.lr_warmup_iters}",
        given=[(*at, "lr_warmup_iters")],
    )
    report.require(
        args.min_lr <= args.lr,
        (*at, "min_lr"),
        f"must be at most lr={args.lr}",
        given=[(*at, "lr")],
    )
    for flag, dtype in DTYPE_OF_FLAG.items():
        report.require(
            not args[flag] or args.dtype == dtype,
            (*at, flag),
            f"contradicts the other keys of the type, which give dtype={args.dtype}",
            given=[(*at, "dtype")],
        )
        report.require(
            args[flag] is not False or args.dtype != dtype,
            (*at, flag),
            f"contradicts dtype={args.dtype}; leave one of them out",
            given=[(*at, "dtype")],
        )


def _check_recomputation(model: ModelConfig, report: Reporter) -> None:
    args, at = model.model_args, ("models", model.name, "model_args")
    for name in ("recompute_method", "recompute_num_layers"):
        report.require(
            not model.trainable or args[name] is None or args.recompute_granularity == "full",
            (*at, name),
            f"needs recompute_granularity: full, it is {args.recompute_granularity}; set it, or "
            "leave this key out",
            given=[(*at, "recompute_granularity"), (*at, "recompute_activations")],
        )


def _check_parallel(model: ModelConfig, report: Reporter) -> None:
    args, at = model.model_args, ("models", model.name, "model_args")
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    virtual = args.virtual_pipeline_model_parallel_size
    report.require(
        virtual is None or pp > 1,
        (*at, "virtual_pipeline_model_parallel_size"),
        "needs pipeline_model_parallel_size > 1",
    )
    report.require(
        not args.sequence_parallel or args.seq_length % tp == 0,
        (*at, "sequence_parallel"),
        f"needs a tensor_model_parallel_size that divides seq_length={args.seq_length}; it is {tp}",
    )
    report.require(
        not args.overlap_param_gather or args.use_distributed_optimizer,
        (*at, "overlap_param_gather"),
        "needs use_distributed_optimizer: True",
    )
    report.require(
        not args.overlap_param_gather or args.overlap_grad_reduce,
        (*at, "overlap_param_gather"),
        "needs overlap_grad_reduce: True",
    )
    shape = _hf_config(args.load) | {
        name: args[name] for name in _HF_NAMES if args[name] is not None
    }
    heads, layers = shape.get("num_attention_heads"), shape.get("num_layers")
    groups = shape.get("num_query_groups")
    # Where the file does not say how many there are, config.json does.
    of_heads, of_groups, of_size = (
        (*at, "num_attention_heads"), (*at, "num_query_groups"),
        ("models", model.name, "tensor_model_parallel_size"),
    )  # fmt: skip
    report.require(
        heads is None or heads % tp == 0,
        of_size if args.num_attention_heads is None else of_heads,
        f"a tensor parallel size of {tp} must divide the {heads} attention heads of the model; set "
        f"it to one of {sizes_that_divide(heads or 1)}",
    )
    report.require(
        groups is None or groups % tp == 0 or tp % groups == 0,
        of_size if args.num_query_groups is None else of_groups,
        f"a tensor parallel size of {tp} must divide the {groups} key-value heads of the model "
        "(num_query_groups), or be a multiple of them",
    )
    report.require(
        not heads or not groups or heads % groups == 0,
        (*at, "num_query_groups"),
        f"{groups} groups must divide num_attention_heads={heads}",
        given=[(*at, "num_attention_heads")],
    )
    context_parallel = args.transformer_args.get("context_parallel_size", 1)
    report.require(
        context_parallel == 1,
        (*at, "context_parallel_size"),
        "must be 1, a sequence is not split over ranks here; tensor_model_parallel_size with "
        "sequence_parallel: True makes room for long ones, too",
    )
    check_layers(model, layers, report)
    check_experts(model, report)


def _check_against_config_json(model: ModelConfig, report: Reporter) -> None:
    args = model.model_args
    for name, value in _hf_config(args.load).items():
        report.require(
            args[name] in (None, value),
            ("models", model.name, "model_args", name),
            f"{args.load}/config.json says {_HF_NAMES[name]}={value}; leave the key out",
        )
    for key, rule in megatron_problems(model):
        report.require(False, key, rule)


def _hf_config(load: str | None) -> dict[str, int]:
    """The structure in a checkpoint's config.json under our names; empty without the file."""
    config = read_config_json(load)
    return {ours: config[theirs] for ours, theirs in _HF_NAMES.items() if theirs in config}


def _check_batches(model: ModelConfig, runtime: RuntimeConfig, report: Reporter) -> None:
    samples = ("runtime", "sample_per_episode")
    name = f"models.{model.name}"
    devices: list[Key] = [("models", model.name, "num_gpu")]
    if model.trainable:
        rows, meaning = max(model.data_parallel_size, 1), f"data parallel size of {name}"
        if model.model_args.max_tokens_per_micro_batch is None:
            rows *= runtime.train_micro_batch_size
            meaning = f"train_micro_batch_size x {meaning}"
        report.require(
            (runtime.train_global_batch_size or 0) % rows == 0,
            ("runtime", "train_global_batch_size"),
            f"must be a multiple of {rows} = {meaning}",
            given=[("runtime", "train_micro_batch_size"), *devices],
        )
        _check_warmup(model, runtime, report)
    elif model.num_gpu or model.model_args.inference_engine == "server":
        responses = model.model_args.responses_per_prompt
        report.require(
            runtime.sample_per_episode % responses == 0,
            samples,
            f"must be a multiple of {responses} = num_inference_per_prompt x n of {name}",
        )
        args = model.model_args
        report.require(
            args.temperature > 0 or responses == 1 or args.beam_width(is_eval=False) > 1,
            ("models", model.name, "model_args", "temperature"),
            f"must be more than 0 with {responses} responses per prompt (num_inference_per_prompt "
            "x n): greedy ones would all be equal",
        )


def _check_warmup(model: ModelConfig, runtime: RuntimeConfig, report: Reporter) -> None:
    args = model.model_args
    num_steps = _num_steps(runtime)
    follows = args.lr_decay_style != "constant" and args.lr_decay_iters is None
    report.require(
        not follows or num_steps is None or args.lr_warmup_iters < num_steps,
        ("models", model.name, "model_args", "lr_warmup_iters"),
        f"must be less than the {num_steps} optimizer steps of the job, at whose end "
        f"lr_decay_style={args.lr_decay_style} is at its lowest",
        given=[("runtime", "train_global_batch_size"), ("runtime", "sample_per_episode")],
    )


def _num_steps(runtime: RuntimeConfig) -> int | None:
    """Most optimizer steps of the job; None where old episodes are trained on again."""
    if runtime.max_relay_episode not in (0, 1) or not runtime.train_global_batch_size:
        return None
    per_episode = -(-runtime.sample_per_episode // runtime.train_global_batch_size)
    return runtime.num_episode * runtime.num_training_epoch * per_episode


def _check_runtime(runtime: RuntimeConfig, report: Reporter) -> None:
    report.require(
        (runtime.train_global_batch_size or 0) <= runtime.sample_per_episode,
        ("runtime", "train_global_batch_size"),
        f"the rows of an optimizer step, train_global_batch_size, are "
        f"{runtime.train_global_batch_size} and must be at most "
        f"sample_per_episode={runtime.sample_per_episode}; lower them, or raise that",
        given=[("runtime", "sample_per_episode"), ("runtime", "train_micro_batch_size")],
    )
    report.require(
        runtime.enable_resume_training or runtime.load_data_checkpoint_iteration is None,
        ("runtime", "load_data_checkpoint_iteration"),
        "says where to resume from, and enable_resume_training is False: the job would start anew "
        "over that checkpoint; set enable_resume_training: True, or leave this key out",
        given=[("runtime", "enable_resume_training")],
    )


def _check_colocation(job: JobConfig, report: Reporter) -> None:
    key = ("runtime", "colocation")
    seen: set[str] = set()
    for name in (name for group in job.runtime.colocation_groups() for name in group):
        model = job.models.get(name)
        known = ", ".join(job.models)
        report.require(
            model is not None,
            key,
            f"{name!r} is none of the models: {known}",
            given=[("models", name)],
        )
        report.require(name not in seen, key, f"model {name!r} may be in one group only")
        report.require(
            model is None or model.num_gpu > 0,
            key,
            f"model {name!r} has no devices to share (num_gpu is 0)",
            given=[("models", name, "num_gpu")],
        )
        seen.add(name)


def _check_saves(job: JobConfig, report: Reporter) -> None:
    """Each checkpoint of a model that is trained would replace the other's."""
    owners: dict[Path, str] = {}
    for model in job.models.values():
        if not model.trainable or not model.model_args.save:
            continue
        owner = owners.setdefault(Path(model.model_args.save).absolute(), model.name)
        report.require(
            owner == model.name,
            ("models", model.name, "model_args", "save"),
            f"is the directory of models.{owner}, too; give each trainable model one of its own, "
            "or leave the key out",
        )


def _check_files(job: JobConfig, report: Reporter) -> None:
    report.require(
        job.runtime.entry_script is None or job.entry_script is not None,
        ("runtime", "entry_script"),
        "no such file",
    )
    for name in ("data_path", "eval_data_path"):
        given = getattr(job.runtime, name) or ()
        for path in [given] if isinstance(given, str) else given:
            report.require(Path(path).is_file(), ("runtime", name), f"no such file: {path}")
    for model in job.models.values():
        directories = {"tokenizer": model.model_args.tokenizer, "load": model.model_args.load}
        # A tokenizer that was not named is that of `load`, and is reported there.
        for directory, name in {path: name for name, path in directories.items()}.items():
            report.require(
                directory is None or Path(directory).is_dir(),
                ("models", model.name, "model_args", name),
                f"no such directory: {directory}",
            )
        load = model.model_args.load
        if model.trainable and load is not None and Path(load).is_dir():
            report.require(
                Path(load, "config.json").is_file(),
                ("models", model.name, "model_args", "load"),
                f"no config.json in {load}; name a directory in Hugging Face form",
            )
        check_draft_directory(model, report)
        for key, rule in missing_packages(model, job.runtime_env):
            report.require(False, key, rule)


def notices(job: JobConfig, given: JobConfig) -> Iterator[str]:
    """Settings that have no effect or an effect that their user may not expect.

    Args:
        job: with all values that follow from others.
        given: as the user gave it.
    """
    yield from _without_effect({"runtime": job.runtime}, UnusedRuntimeKeys)
    for unused, why in idle_runtime_keys(job.runtime):
        yield f"no effect of {', '.join(unused)}; {why}"
    args_of = {f"models.{name}": model.model_args for name, model in job.models.items()}
    for group in (MegatronArgs, UnusedArgs, LoggingArgs, RetiredArgs):
        yield from _without_effect(args_of, group)
    for name, model in job.models.items():
        args = model.model_args
        idle = idle_fields(model) if model.trainable else ()
        for unused, why in (*without_effect(model), *idle_adapter_keys(model), *idle):
            yield f"models.{name}: no effect of {', '.join(unused)}; {why}"
        if given.models[name].model_args.sequence_parallel and not args.sequence_parallel:
            yield f"models.{name}: no effect of sequence_parallel=True with tensor parallel size 1"
        num_steps = _num_steps(job.runtime)
        if model.trainable and num_steps is not None and args.lr_warmup_iters > num_steps:
            yield (
                f"models.{name}: lr_warmup_iters={args.lr_warmup_iters} is more than the "
                f"{num_steps} optimizer steps of the job, which never reaches lr={args.lr}"
            )
        for inner in ("lora", "batch_generation"):
            section = getattr(model, inner)
            yield from _without_effect({f"models.{name}.{inner}": section}, type(section))
        changed = changed_sampling(args)
        generates = model.num_gpu or args.inference_engine == "server"
        is_trained_on = not model.trainable and not name.startswith("reward")  # or it judges
        if changed and is_trained_on and generates:
            yield (
                f"models.{name}: {', '.join(changed)} draws training responses from a "
                "changed distribution, but the trainer's log probabilities are of the whole "
                "softmax: the probability ratio will be biased"
            )


def _without_effect(sections: Mapping[str, Section], group: type) -> Iterator[str]:
    """The keys of a group that are set; those that the same sections set alike in one line."""
    owners: dict[str, list[str]] = {}
    for title, section in sections.items():
        for name, field in group.model_fields.items():
            value = getattr(section, name)
            if name in section.model_fields_set and value != field.default:
                owners.setdefault(f"{name}={value!r}", []).append(title)
    by_owners: dict[str, list[str]] = {}
    for assignment, titles in owners.items():
        by_owners.setdefault(", ".join(titles), []).append(assignment)
    for titles, assignments in by_owners.items():
        yield f"{titles}: no effect of {', '.join(assignments)}; {group.no_effect}"
