"""Do a trainer's keys fit the algorithm that reads them?

What one model's keys say by themselves is checked when the yaml is read; which algorithm reads
them, only the engine knows.
"""

from __future__ import annotations

from collections.abc import Iterable

from chatlearn_vllm.config.model_args import AlgorithmArgs
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.config.sampling import incomparable_logprobs
from chatlearn_vllm.config.schema import RuntimeConfig
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.observability.logging import get_logger

logger = get_logger(__name__)

_OF_GRPO = ("advantage_estimator", "overlong_buffer_len")
"""Keys of a trainer's file that only GRPOEngine reads, and that ChatLearn's files do not have."""

_CLIPRANGE_OF_TOKENS = AlgorithmArgs.model_fields["cliprange"].default

_OF_POLICY_LOSS = frozenset(
    {
        "cliprange", "cliprange_high", "dual_clip", "ratio_level", "tis_imp_ratio_cap",
        "loss_agg", "entropy_coef", "init_kl_coef",
    }
)  # fmt: skip
_READ_BY_GRPO = _OF_POLICY_LOSS | {*_OF_GRPO, "overlong_penalty_factor"}
_READ_BY_ESTIMATOR = {
    "grpo": _READ_BY_GRPO | {"kl_estimator", "advantage_std"},
    "rloo": _READ_BY_GRPO | {"kl_estimator"},
    "reinforce++": _READ_BY_GRPO | {"gamma", "cliprange_reward"},  # its KL is part of the rewards
}
_READ_BY_PPO = _OF_POLICY_LOSS | {
    "fix_kl_coef", "target", "horizon", "gamma", "lam", "cliprange_reward",
}  # fmt: skip
_READ_BY_PPO_VALUE = frozenset({"cliprange_value", "loss_agg"})
_READ_BY_ONLINE_DPO = frozenset({"dpo_weight", "use_ipo", "label_smoothing"})


def check_grpo_keys(policy: BaseModule, trainer: BaseModule) -> None:
    """Check the keys of GRPO and its relatives, and tell which have no effect.

    Raises:
        UserError: says all that does not fit.
    """
    args, of_policy = trainer.model_args, policy.model_args
    problems = []
    if of_policy.responses_per_prompt < 2 and args.advantage_estimator != "reinforce++":
        problems.append(
            f"models.{policy.name}: num_inference_per_prompt={of_policy.num_inference_per_prompt} "
            f"gives one response per prompt, whose advantage is always 0: "
            f"advantage_estimator={args.advantage_estimator} compares several; set "
            f"num_inference_per_prompt: 2 or more, or models.{trainer.name}: advantage_estimator: "
            "reinforce++"
        )
    if args.ratio_level == "sequence" and args.advantage_estimator == "reinforce++":
        problems.append(
            f"models.{trainer.name}: ratio_level=sequence needs one advantage per response, and "
            "advantage_estimator=reinforce++ gives one per token; change one of the two"
        )
    if (args.overlong_buffer_len or 0) > of_policy.max_new_tokens:
        problems.append(
            f"models.{trainer.name}: overlong_buffer_len={args.overlong_buffer_len} must be at "
            f"most max_new_tokens={of_policy.max_new_tokens} of models.{policy.name}"
        )
    problems += _of_divisor(policy, trainer)
    has_kl_rewards = args.advantage_estimator == "reinforce++" and args.init_kl_coef > 0
    problems += _of_raw_logprobs(policy, trainer, has_kl_rewards=has_kl_rewards)
    _raise(problems)
    which = "" if args.advantage_estimator == "grpo" else f" with {args.advantage_estimator}"
    _tell_unread(f"GRPOEngine{which}", trainer, _READ_BY_ESTIMATOR[args.advantage_estimator])
    if args.ratio_level == "sequence" and args.cliprange == _CLIPRANGE_OF_TOKENS:
        logger.warning(
            "models.%s: cliprange=%g is for ratios of tokens; with ratio_level=sequence a ratio is "
            "their geometric mean over a response, which stays far inside: nothing is clipped. "
            "GSPO was published with cliprange: 3e-4 and cliprange_high: 4e-4",
            trainer.name, args.cliprange,
        )  # fmt: skip
    in_loss = args.init_kl_coef > 0 and args.advantage_estimator != "reinforce++"
    if in_loss and args.kl_estimator == "k1":
        logger.warning(
            "models.%s: kl_estimator=k1 in a loss has a gradient of 0 on average, so "
            "init_kl_coef=%g holds nothing back; k2 and k3 do",
            trainer.name, args.init_kl_coef,
        )  # fmt: skip


def check_ppo_keys(
    policy: BaseModule,
    trainer: BaseModule,
    value_trainer: BaseModule,
    runtime: RuntimeConfig,
    *,
    has_reference: bool,
) -> None:
    """Check the keys of PPO, and tell which have no effect.

    Args:
        policy: what generates.
        trainer: of the policy.
        value_trainer: of the value model.
        runtime: the job's.
        has_reference: whether there is a KL whose coefficient can adapt.

    Raises:
        UserError: says all that does not fit.
    """
    args = trainer.model_args
    problems = list(_of_grpo("RLHFEngine", trainer, runtime))
    if args.ratio_level == "sequence":
        problems.append(
            f"models.{trainer.name}: ratio_level=sequence needs one advantage per response, and "
            "PPO has one per token; set ratio_level: token"
        )
    if has_reference and not args.fix_kl_coef and 5 * args.horizon <= runtime.sample_per_episode:
        problems.append(
            f"models.{trainer.name}: horizon={args.horizon} must be more than a fifth of "
            f"runtime.sample_per_episode={runtime.sample_per_episode}, or the adaptive KL "
            "coefficient could become 0 in one episode"
        )
    for trained in (trainer, value_trainer):
        problems += _of_divisor(policy, trained)
    problems += _of_raw_logprobs(policy, trainer, has_kl_rewards=has_reference)
    _raise(problems)
    _tell_unread("RLHFEngine", trainer, _READ_BY_PPO)
    _tell_unread("RLHFEngine", value_trainer, _READ_BY_PPO_VALUE)


def check_preference_keys(trainer: BaseModule, runtime: RuntimeConfig) -> None:
    """Check the keys of Online DPO, and tell which have no effect.

    Raises:
        UserError: says all that does not fit.
    """
    args = trainer.model_args
    problems = list(_of_grpo("OnlineDPOEngine", trainer, runtime))
    if levels := runtime.mismatch_stop.set_levels():
        problems.append(
            f"runtime.mismatch_stop.{next(iter(levels))} has no effect in OnlineDPOEngine, whose "
            "trainer does not compare its log-probabilities with the rollout's; leave it out"
        )
    if args.use_ipo and args.label_smoothing:
        problems.append(
            f"models.{trainer.name}: label_smoothing={args.label_smoothing} is of DPO's loss; "
            "set it to 0 with use_ipo: True"
        )
    _raise(problems)
    _tell_unread("OnlineDPOEngine", trainer, _READ_BY_ONLINE_DPO)


def warn_of_temperatures(reference: BaseModule | None, trainer: BaseModule) -> None:
    """Say so where the KL compares distributions of two temperatures."""
    if reference is None:
        return
    one, other = reference.model_args.temperature, trainer.model_args.temperature
    if one != other:
        logger.warning(
            "models.%s has temperature=%g and models.%s %g: their log-probabilities differ even "
            "with equal weights, so the KL between them is never 0; set the same",
            reference.name, one, trainer.name, other,
        )  # fmt: skip


def _of_divisor(policy: BaseModule, trainer: BaseModule) -> Iterable[str]:
    """Dr. GRPO's constant is the longest response, which the trainer does not see."""
    args, longest = trainer.model_args, policy.model_args.max_new_tokens
    if args.loss_agg == "seq-mean-token-sum-norm" and args.max_new_tokens != longest:
        yield (
            f"models.{trainer.name}: loss_agg={args.loss_agg} divides by its "
            f"max_new_tokens={args.max_new_tokens}, which must be that of models.{policy.name}, "
            f"{longest}"
        )


def _of_raw_logprobs(
    policy: BaseModule, trainer: BaseModule, *, has_kl_rewards: bool
) -> Iterable[str]:
    """Raw log-probabilities are of another temperature than the responses may have."""
    if policy.model_args.engine_args.get("logprobs_mode") != "raw_logprobs":
        return
    cap = trainer.model_args.tis_imp_ratio_cap
    readers = [] if cap is None else [f"tis_imp_ratio_cap={cap:g}"]
    readers += ["the KL penalty of the rewards"] if has_kl_rewards else []
    reasons = incomparable_logprobs(policy.model_args, trainer.model_args)
    if readers and reasons:
        yield (
            f"models.{policy.name}: {'; '.join(reasons)}: {' and '.join(readers)} of "
            f"models.{trainer.name} would compare the two; leave logprobs_mode out"
        )


def _of_grpo(engine: str, trainer: BaseModule, runtime: RuntimeConfig) -> Iterable[str]:
    rule = f"has no effect in {engine}, only in GRPOEngine; leave it out"
    if runtime.dynamic_sampling:
        yield f"runtime.dynamic_sampling {rule}"
    for key in _OF_GRPO:
        value = trainer.model_args[key]
        if value != AlgorithmArgs.model_fields[key].default:
            yield f"models.{trainer.name}: {key}={value} {rule}"


def _tell_unread(engine: str, trainer: BaseModule, read: frozenset[str]) -> None:
    """Name the keys that are set in vain; no error, for ChatLearn's files share them."""
    args = trainer.model_args
    unread = [
        f"{key}={args[key]!r}"
        for key, field in AlgorithmArgs.model_fields.items()
        if key in args.model_fields_set - read and args[key] != field.default
    ]
    if unread:
        logger.info(
            "models.%s: no effect of %s in %s; neither it nor the loss that comes with it reads "
            "them",
            trainer.name, ", ".join(unread), engine,
        )  # fmt: skip


def _raise(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))
