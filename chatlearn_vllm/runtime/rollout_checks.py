"""Do the keys of a policy fit those of the models that are trained on its responses?

What one model's keys say by themselves is checked when the yaml is read; here is what depends on
which module plays which role.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from chatlearn_vllm.config.engine_support import (
    IN_HOST_MEMORY,
    cpu_problem,
    quantization_of_checkpoint,
)
from chatlearn_vllm.config.model_files import (
    OTHER_CONFIG,
    has_experts,
    longest_sequence,
    read_config_json,
)
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.config.sampling import (
    incomparable_logprobs,
    sampling_keys_of_whole_responses,
)
from chatlearn_vllm.config.schema import JobConfig, MismatchWarnConfig, RuntimeConfig
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.megatron_module import MegatronModule
from chatlearn_vllm.modules.preference_module import PreferenceModule
from chatlearn_vllm.modules.vllm_module import VLLMModule
from chatlearn_vllm.observability.logging import get_logger

logger = get_logger(__name__)

_OF_TOKENS = ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias")
"""Keys that hold token ids."""


def check_beam_search(policy: BaseModule, trainer: BaseModule) -> None:
    """Check that searched responses are trained on by what does not need their probabilities.

    Raises:
        UserError: they are not.
    """
    width = policy.model_args.beam_width(is_eval=False)
    if width > 1 and not isinstance(trainer, PreferenceModule):
        raise UserError(
            f"models.{policy.name}: num_beams={width} searches responses, and "
            f"{type(trainer).__name__} trains on the probability with which they were sampled; "
            "set num_beams: 1 and use_beam_search: False, for greedy responses temperature: 0, "
            "for beams in evaluation eval_num_beams"
        )


def check_sleep_level(policy: BaseModule, *, sleeps: bool) -> None:
    """Check that a policy whose weights are dropped gets them again before it generates.

    Args:
        policy: the module.
        sleeps: whether it gives its memory back.

    Raises:
        UserError: it does not.
    """
    sleep_level, sync_frequency = policy.model_args.sleep_level, policy.module_args.sync_frequency
    if sleeps and sync_frequency != 1 and sleep_level != 1:
        raise UserError(
            f"models.{policy.name}: sync_frequency={sync_frequency} leaves episodes without a "
            f"weight sync, and sleep_level={sleep_level} drops the weights in between; set "
            "sleep_level: 1"
        )


def check_model_has(policy: BaseModule) -> None:
    """Check that a model has the positions and tokens that its keys ask for.

    Raises:
        UserError: it does not.
    """
    args = policy.model_args
    if args.engine_args.keys() & OTHER_CONFIG:
        return
    config = read_config_json(args.load)
    positions, num_tokens = longest_sequence(config), config.get("vocab_size")
    is_allowed = os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") != "0"
    is_checked = args.inference_engine == "vllm" and not is_allowed
    lengths = {
        "seq_length": args.seq_length,
        "max_model_len": args.engine_args.get("max_model_len"),
    }
    for name, length in lengths.items() if is_checked and positions is not None else ():
        if length is not None and length > positions:
            raise UserError(
                f"models.{policy.name}: {name}={length} must be at most {positions}, for which the "
                f"model has positions ({args.load}/config.json)"
            )
    if not isinstance(num_tokens, int):
        return
    for is_eval in (False, True):
        width = args.beam_width(is_eval=is_eval)
        if width > 1 and 2 * width > num_tokens:
            raise UserError(
                f"models.{policy.name}: {'eval_' if is_eval else ''}num_beams={width} must be at "
                f"most {num_tokens // 2}: of each beam twice as many next tokens are looked at, "
                f"and the model has {num_tokens} ({args.load}/config.json)"
            )
    for name in _OF_TOKENS:
        largest = max(args.sampling_args.get(name) or (), default=0)
        if largest >= num_tokens:
            raise UserError(
                f"models.{policy.name}: {name}: token {largest} is none of the {num_tokens} that "
                f"{args.load}/config.json says the model has"
            )


def check_room_for_rollouts(policy: BaseModule, others: Iterable[BaseModule]) -> None:
    """Check that micro-batches which are limited in tokens hold the policy's longest sequence.

    Args:
        policy: the module that generates.
        others: of the same job; those on other engines are passed over.

    Raises:
        UserError: one has no room for it, which an episode would show first that has such a row.
    """
    longest = policy.model_args.seq_length
    for reader in others:
        if not isinstance(reader, MegatronModule) or not reader.reads_policy_tokens:
            continue
        rows = 2 if isinstance(reader, PreferenceModule) else 1
        parts = _parts_of_a_sequence(reader)
        padded = -(-longest // parts) * parts
        limit = reader.model_args.max_tokens_per_micro_batch
        if limit is not None and limit < rows * padded:
            what = "a pair of responses" if rows == 2 else "a sequence"
            room = f", in {parts} equal parts" if padded > longest else ""
            raise UserError(
                f"models.{reader.name}: max_tokens_per_micro_batch={limit} must be at least "
                f"{rows * padded}: {what} of models.{policy.name} has up to that many tokens "
                f"(its seq_length is {longest}{room}), and is not cut"
            )


def _parts_of_a_sequence(reader: BaseModule) -> int:
    """Ranks that hold equal parts of each, by sequence parallelism; experts bring it with them."""
    args = reader.model_args
    is_parallel = args.sequence_parallel or has_experts(read_config_json(args.load))
    return reader.module_args.tensor_model_parallel_size if is_parallel else 1


def check_engines_on_cpus(job: JobConfig, modules: Iterable[BaseModule]) -> None:
    """Check that vLLM can do without GPUs what it is asked for.

    Raises:
        UserError: it cannot.
    """
    for module in modules:
        if isinstance(module, VLLMModule) and module.model_args.inference_engine == "vllm":
            if problem := cpu_problem(module.module_args, job.runtime):
                raise UserError(f"{problem} (this cluster has no GPUs)")


def check_takes_weights(target: BaseModule) -> None:
    """Check that the weights of a trainer can be what a model computes with.

    Raises:
        UserError: its checkpoint is quantised, or vLLM keeps its weights in host memory.
    """
    how = quantization_of_checkpoint(target.model_args)
    if how is not None:
        raise UserError(
            f"models.{target.name}: the checkpoint in `load` is quantised ({how}), and the "
            "weights that a trainer sends are not; load the model that is trained, with "
            "quantization: fp8 where its responses should come from quantised weights"
        )
    for name in IN_HOST_MEMORY:
        if value := target.model_args.engine_args.get(name):
            raise UserError(
                f"models.{target.name}: {name}={value} keeps weights in host memory, and those of "
                "a trainer are sent to device memory only; leave it out (free_memory: True makes "
                "room for others, a larger tensor_model_parallel_size needs less on each GPU)"
            )


def check_partial_rollouts(policy: BaseModule, trainer: BaseModule, runtime: RuntimeConfig) -> None:
    """Check that responses can go on in a later episode, if they are to.

    Raises:
        UserError: they cannot.
    """
    if runtime.max_rollout_round == 1:
        return
    key = f"runtime.max_rollout_round={runtime.max_rollout_round}"
    if runtime.dynamic_sampling:
        raise UserError(
            f"{key} and runtime.dynamic_sampling: True both decide when an episode has enough "
            "samples; leave one of them out"
        )
    sampling = sampling_keys_of_whole_responses(policy.model_args)
    if sampling:
        raise UserError(
            f"models.{policy.name}: {sampling} would count anew where a response goes on "
            f"({key}); leave it out, or set runtime.max_rollout_round: 1"
        )
    # Which of two responses is better does not depend on the weights that sampled them.
    is_weighed = not isinstance(trainer, PreferenceModule)
    if is_weighed and trainer.model_args.tis_imp_ratio_cap is None:
        logger.warning(
            "%s trains on tokens of up to %d weight versions ago as if they were new; "
            "models.%s: tis_imp_ratio_cap corrects for that",
            key, runtime.max_rollout_round - 1, trainer.name,
        )  # fmt: skip


def with_levels_that_mean_something(
    policy: BaseModule, trainer: BaseModule, runtime: RuntimeConfig
) -> RuntimeConfig:
    """`runtime`, without mismatch_warn where the two sides' log-probabilities must differ.

    Told once, not in every episode.

    Raises:
        UserError: mismatch_stop is set in such a job.
    """
    reasons = incomparable_logprobs(policy.model_args, trainer.model_args)
    if not reasons:
        return runtime
    why = (
        f"the log-probabilities of models.{policy.name} are not those of models.{trainer.name} "
        f"even with equal weights ({'; '.join(reasons)})"
    )
    if stop := runtime.mismatch_stop.set_levels():
        raise UserError(
            f"runtime.mismatch_stop={stop} means nothing here: {why}; sample from the whole "
            "softmax at the trainer's temperature, or leave mismatch_stop out"
        )
    logger.warning("no mismatch_warn in this job: %s", why)
    none = MismatchWarnConfig(**dict.fromkeys(MismatchWarnConfig.model_fields))
    return runtime.model_copy(update={"mismatch_warn": none})
