"""Can the engine of a model that generates do what its keys ask for?"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn_vllm.config.engine_support import (
    CHECKPOINT_QUANTIZATION,
    DRAFT_DIR_METHODS,
    DRAFT_SAMPLE_METHODS,
    METHODS,
    METHODS_OF_ANY_LENGTH,
    conflicts,
    draws_drafts,
)
from chatlearn_vllm.config.model_files import read_config_json
from chatlearn_vllm.config.sampling_checks import sampling_problems
from chatlearn_vllm.config.upstream_fields import speculative_fields, upstream_names

if TYPE_CHECKING:
    from chatlearn_vllm.config.checks import Reporter
    from chatlearn_vllm.config.model_args import ModelArgs
    from chatlearn_vllm.config.problems import Key
    from chatlearn_vllm.config.schema import ModelConfig, RuntimeConfig

_SET_BY_VLLM = {
    "target_model_config": "the model itself",
    "target_parallel_config": "the model itself",
    "draft_model_config": "model",
    "draft_parallel_config": "draft_tensor_parallel_size",
    "tensor_parallel_size": "draft_tensor_parallel_size",
}
"""Fields of SpeculativeConfig that are none of the user's -> what is."""
_REFUSED = {
    "skip_tokenizer_init": (
        (True,),
        "leaves responses without text, stop strings and the tokenizer's end-of-sequence token "
        "without effect; leave it out",
    ),
    "scheduling_policy": (
        ("priority",),
        "must be fcfs: no request has a priority here, and ranks of a replica, which schedule for "
        "themselves, would order equal ones differently; leave it out",
    ),
    "tokens_only": (
        (True,),
        "leaves responses without text and stop strings without effect; leave it out",
    ),
    "logprobs_mode": (
        ("raw_logits", "processed_logits"),
        "must be processed_logprobs or raw_logprobs: `logprobs` of responses are taken for "
        "log-probabilities, and logits are none; leave it out",
    ),
    "enable_lora": (
        (True,),
        "has no effect but slower steps: requests name no adapter, and a trainer's (lora_r) are "
        "merged at each weight sync; leave it out",
    ),
    "runner": (("pooling", "draft"), "must be generate, for responses; leave it out"),
    "convert": (("embed", "classify"), "must be none, for responses; leave it out"),
}
"""Values of vLLM's EngineArgs with which responses would silently be others."""
_NOT_VERIFIED = {
    "logit_bias": "which vLLM verifies without it",
    "min_tokens": "with which vLLM forbids end tokens for one token too long where drafts are "
    "accepted beyond the minimum; leave one of the two out",
}
"""Fields of SamplingParams with which drafts change what is drawn."""
_MUST_NAME_NUM_TOKENS = ("ngram", "ngram_gpu", "draft_model", "eagle", "eagle3")
"""Methods that have no number of tokens of their own."""


def check_engine(model: ModelConfig, runtime: RuntimeConfig, report: Reporter) -> None:
    """Check what vLLM's configuration would refuse once processes run, or get wrong."""
    is_in_job = model.model_args.inference_engine != "server"
    if model.trainable or (is_in_job and not model.num_gpu):
        return
    for key, rule in conflicts(model, runtime):
        report.require(False, key, rule)
    for key, rule in sampling_problems(model):
        report.require(False, key, rule)
    for name, (values, rule) in _REFUSED.items():
        key = ("models", model.name, "model_args", name)
        report.require(model.model_args.engine_args.get(name) not in values, key, rule)
    report.require(
        model.model_args.engine_args.get("enable_sleep_mode") is not False
        or not model.offload_weights,
        ("models", model.name, "model_args", "enable_sleep_mode"),
        "must be True where the model is to give its memory back while others work; leave it out, "
        "or set free_memory: False (and offload_weights: False)",
        given=[("models", model.name, name) for name in ("free_memory", "offload_weights")],
    )
    _check_quantization(model, report)
    if model.model_args.speculative_config is not None:
        _check_speculation(model, report)


_NO_PLUGIN = "; no plugin of vLLM is installed here that could add to them"


def _has_plugins() -> bool:
    """Whether others than vLLM register something with it, or nobody knows because it is absent."""
    if not upstream_names("quantization"):
        return True
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    return any(not plugin.value.startswith("vllm.") for plugin in plugins)


def _check_quantization(model: ModelConfig, report: Reporter) -> None:
    args, at = model.model_args, ("models", model.name, "model_args")
    method = args.quantization
    for name in ("load_format", "quantization") if args.inference_engine == "vllm" else ():
        known = upstream_names(name)
        nearest = _nearest(str(args[name]), known)
        report.require(
            # What resembles none of them may be registered by a plugin.
            args[name] is None or args[name] in known or (not nearest and _has_plugins()),
            (*at, name),
            f"must be one of vLLM's: {', '.join(known)}{nearest or _NO_PLUGIN}",
        )
    report.require(
        method not in CHECKPOINT_QUANTIZATION or args.load_format != "dummy",
        (*at, "quantization"),
        "is how the checkpoint in `load` is quantised, but load_format: dummy waits for the "
        "weights of a trainer, which are not; set quantization: fp8 for a model that is trained, "
        "load_format: auto for one that is not",
    )
    given = read_config_json(args.load).get("quantization_config") or {}
    of_checkpoint = given.get("quant_method")
    report.require(
        of_checkpoint is None or args.load_format != "dummy",
        (*at, "load"),
        f"config.json says that the weights are quantised ({of_checkpoint}), a trainer's are not; "
        "set load_format: auto for a model that is not trained, or load the unquantised model",
    )
    if method in CHECKPOINT_QUANTIZATION and args.load and read_config_json(args.load):
        family = "awq" if "awq" in method else "gptq"
        report.require(
            of_checkpoint is not None and family in of_checkpoint,
            (*at, "quantization"),
            f"{args.load}/config.json has "
            + (f"quant_method={of_checkpoint}" if of_checkpoint else "no quantization_config")
            + f"; leave the key out, or load a checkpoint that {family.upper()} made",
            given=[(*at, "load")],
        )


def _check_speculation(model: ModelConfig, report: Reporter) -> None:
    args = model.model_args
    config: Mapping[str, Any] = args.speculative_config or {}
    at: Key = ("models", model.name, "model_args")
    inside: Key = (*at, "speculative_config")
    for name in config:
        _check_name(name, (*inside, name), report)
    _check_older_names(model, report)

    def at_key(name: str) -> Key:
        older = {"model": "speculative_model"}.get(name, name)
        return (*at, older) if args.get(older) is not None else (*inside, name)

    method = config["method"]
    report.require(
        method in METHODS,
        (*inside, "method"),
        f"must be one of vLLM's methods that draft tokens: {', '.join(METHODS)}"
        + _nearest(str(method), METHODS),
    )
    number = config.get("num_speculative_tokens")
    is_number = isinstance(number, int) and not isinstance(number, bool) and number > 0
    report.require(
        is_number or (number is None and method not in _MUST_NAME_NUM_TOKENS),
        at_key("num_speculative_tokens") if number is not None else inside,
        "num_speculative_tokens must say how many tokens are drafted at a time, 1 or more",
    )
    if method in ("ngram", "ngram_gpu"):
        _check_ngrams(config, inside, report)
    report.require(
        config.get("rejection_sample_method", "standard") != "synthetic",
        (*inside, "rejection_sample_method"),
        "synthetic accepts drafts without looking at the model, so that responses and their "
        "log-probabilities are not the model's; leave it out",
    )
    _check_draft_sampling(args, inside, report)
    report.require(
        config.get("num_speculative_tokens_per_batch_size") is None
        or method in METHODS_OF_ANY_LENGTH,
        (*inside, "num_speculative_tokens_per_batch_size"),
        f"vLLM's {method} makes drafts of one length only; leave it out, or set one of the methods "
        f"{', '.join(METHODS_OF_ANY_LENGTH)}",
    )
    report.require(
        not args.engine_args.get("disable_log_stats"),
        (*at, "disable_log_stats"),
        "must be False with speculative_config: how many drafts are accepted is among vLLM's "
        "statistics; leave it out",
    )
    budget = args.max_num_batched_tokens
    if method == "draft_model" and is_number:
        report.require(
            budget is None or budget > args.max_num_seqs,
            (*at, "max_num_batched_tokens"),
            f"must be more than max_num_seqs={args.max_num_seqs}: a draft model takes a token of "
            "each running sequence for itself; verifying all of them in one step takes "
            f"{args.max_num_seqs * (number + 2)}",
            given=[(*at, "max_num_seqs")],
        )
    tensor = model.tensor_model_parallel_size
    own_tensor = config.get("draft_tensor_parallel_size")
    allowed = (tensor,) if method == "draft_model" else (1, tensor)
    report.require(
        own_tensor is None or own_tensor in allowed,
        (*inside, "draft_tensor_parallel_size"),
        f"must be {' or '.join(str(size) for size in sorted(set(allowed)))}, as "
        f"tensor_model_parallel_size is {tensor}; leave it out",
    )
    for name in ("min_p", "eval_min_p"):
        report.require(
            not args[name], (*at, name), "must be 0 with speculative_config, which vLLM verifies "
            "without it; use top_p",
        )  # fmt: skip
    for name, why in _NOT_VERIFIED.items():
        rule = f"does not go with speculative_config, {why}"
        report.require(not args.sampling_args.get(name), (*at, name), rule)
    if method in DRAFT_DIR_METHODS:
        _check_draft(model, config, at_key("model"), inside, report)


def _check_draft_sampling(args: ModelArgs, inside: Key, report: Reporter) -> None:
    """Check how a draft chooses the tokens that it proposes."""
    config = args.speculative_config or {}
    key = (*inside, "draft_sample_method")
    chosen = config.get("draft_sample_method", "greedy")
    report.require(
        chosen in DRAFT_SAMPLE_METHODS,
        key,
        f"must be one of vLLM's: {', '.join(DRAFT_SAMPLE_METHODS)}"
        + _nearest(str(chosen), DRAFT_SAMPLE_METHODS),
    )
    report.require(
        not draws_drafts(args) or not config.get("use_heterogeneous_vocab"),
        key,
        "must be greedy with use_heterogeneous_vocab: True, where vLLM compares no probabilities; "
        "leave it out",
    )
    report.require(
        not draws_drafts(args) or not args.seed_per_response,
        key,
        "must be greedy with seed_per_response: True, because vLLM draws drafts without the "
        "responses' seeds; set seed_per_response: False, with which whole rollouts repeat",
        given=[(*inside[:-1], "seed_per_response")],
    )


def _check_ngrams(config: Mapping[str, Any], inside: Key, report: Reporter) -> None:
    """Check the lengths of the beginnings that are looked up; either follows from the other."""
    lengths = {name: config.get(name) for name in ("prompt_lookup_min", "prompt_lookup_max")}
    for name, value in lengths.items():
        report.require(
            value is None or (type(value) is int and value > 0),
            (*inside, name),
            "must be a number of tokens, 1 or more",
        )
    least, most = lengths.values()
    report.require(
        type(least) is not int or type(most) is not int or least <= most,
        (*inside, "prompt_lookup_min"),
        f"must be at most prompt_lookup_max={most}",
    )


def _check_name(name: str, key: Key, report: Reporter) -> None:
    known = speculative_fields()
    report.require(
        not known or name in known,
        key,
        "unknown field of vLLM's SpeculativeConfig" + _nearest(name, known - _SET_BY_VLLM.keys()),
    )
    report.require(
        name not in _SET_BY_VLLM,
        key,
        f"is set by vLLM; say {_SET_BY_VLLM.get(name)}",
    )


def _check_older_names(model: ModelConfig, report: Reporter) -> None:
    args, at = model.model_args, ("models", model.name, "model_args")
    config = args.speculative_config or {}
    older = {"speculative_model": "model", "num_speculative_tokens": "num_speculative_tokens"}
    for name, new in older.items():
        value = args[name]
        same = {value, "ngram" if value == "[ngram]" else value}
        of_ngram = new == "model" and config["method"] == "ngram" and new not in config
        report.require(
            value is None or config.get(new) in same or of_ngram,
            (*at, name),
            f"is the older name of {new} in speculative_config, which is given too; keep one",
        )


def _check_draft(
    model: ModelConfig, config: Mapping[str, Any], key: Key, inside: Key, report: Reporter
) -> None:
    """Check that a draft fits the model that verifies it, as far as their config.json say."""
    args, draft = model.model_args, config.get("model")
    report.require(
        isinstance(draft, str),
        key if draft is not None else inside,
        f"method {config['method']} needs `model`: the directory of the draft's weights",
    )
    load_config = config.get("draft_load_config")
    report.require(
        load_config is None or isinstance(load_config, dict),
        (*inside, "draft_load_config"),
        "must be a map with the fields of vLLM's LoadConfig, such as load_format",
    )
    if config["method"] != "draft_model" or not isinstance(draft, str):
        return
    own, target = (read_config_json(path).get("vocab_size") for path in (draft, args.load))
    report.require(
        own is None or target is None or own == target or config.get("use_heterogeneous_vocab"),
        key,
        f"drafts from a vocabulary of {own} tokens, {args.load} has {target}; take a draft with "
        "the model's tokenizer, or set use_heterogeneous_vocab: True in speculative_config",
    )


def check_draft_directory(model: ModelConfig, report: Reporter) -> None:
    """Check that the directory of a draft's weights is there."""
    args = model.model_args
    config = args.speculative_config or {}
    draft = config.get("model")
    if config.get("method") not in DRAFT_DIR_METHODS or not isinstance(draft, str):
        return
    at: Key = ("models", model.name, "model_args")
    is_older = args.speculative_model is not None
    report.require(
        Path(draft, "config.json").is_file(),
        (*at, "speculative_model") if is_older else (*at, "speculative_config", "model"),
        f"no such directory, or no config.json in it: {draft}",
    )


def _nearest(name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(str(name), sorted(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
