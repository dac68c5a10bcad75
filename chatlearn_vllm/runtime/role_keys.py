"""Which keys of a model's entry does its role not read?

Which model plays which role, only the engine knows; what a yaml says without it is told when that
is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from chatlearn_vllm.config.schema import ModelConfig
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.megatron_module import MegatronModule
from chatlearn_vllm.observability.logging import get_logger

logger = get_logger(__name__)


def tell_unread_keys(
    modules: Collection[BaseModule],
    *,
    policy: BaseModule | None = None,
    rewards: Collection[BaseModule] = (),
    targets: Collection[BaseModule] = (),
) -> None:
    """Name the keys that are set in vain; no error, for files made for ChatLearn have them.

    Args:
        modules: all roles of the job.
        policy: who generates.
        rewards: whose rewards the engine adds.
        targets: who gets the weights of a model that is trained.
    """
    for module in modules:
        for name, why in _unread(module, policy, rewards, targets):
            value = getattr(module.module_args, name)
            logger.info("models.%s: no effect of %s=%s; %s", module.name, name, value, why)


def _unread(
    module: BaseModule,
    policy: BaseModule | None,
    rewards: Collection[BaseModule],
    targets: Collection[BaseModule],
) -> Iterator[tuple[str, str]]:
    """Keys that are set in vain, and why."""
    args = module.module_args
    # Where a model has no value of its own, the runtime's was filled in.
    if args.generation_batch_size != module.runtime_args.generation_batch_size:
        has_tokens = module.model_args.max_tokens_per_micro_batch is not None
        if module is policy:
            yield "generation_batch_size", "max_num_seqs says how many responses are made at once"
        elif isinstance(module, MegatronModule) and has_tokens:
            yield "generation_batch_size", "max_tokens_per_micro_batch replaces it"
    if _is_changed(args, "sync_frequency") and module not in targets:
        yield "sync_frequency", f"it is of models that get weights{_named(targets)}"
    if _is_changed(args, "reward_weight") and module not in rewards:
        yield "reward_weight", f"it is of models whose rewards are added{_named(rewards)}"


def _is_changed(args: ModelConfig, name: str) -> bool:
    return getattr(args, name) != ModelConfig.model_fields[name].default


def _named(modules: Collection[BaseModule]) -> str:
    return ": " + ", ".join(f"models.{one.name}" for one in modules) if modules else ", here none"
