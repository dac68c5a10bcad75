"""Which keys do nothing, as others of the same job are?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from chatlearn_vllm.config.model_args import LoraArgs

if TYPE_CHECKING:
    from chatlearn_vllm.config.schema import ModelConfig, RuntimeConfig
    from chatlearn_vllm.config.section import Section


def idle_runtime_keys(runtime: RuntimeConfig) -> Iterator[tuple[list[str], str]]:
    """Keys of the episode loop that are set in vain, as `key=value`, and why."""
    saves = runtime.save_episode_interval is not None
    keeps = runtime.max_relay_episode not in (0, 1)
    groups = (
        (saves, ("async_save", "max_ckpt_to_keep", "max_data_ckpt_nums"),
         "nothing is saved without save_episode_interval"),
        (keeps, ("relay_episode_offset",), "no samples are kept without max_relay_episode"),
        (runtime.dynamic_sampling, ("max_num_gen_batches",), "only with dynamic_sampling: True"),
        (runtime.max_rollout_round > 1, ("rollout_over_sampling",),
         "only with max_rollout_round above 1"),
        (runtime.validate_param_sync, ("validate_param_sync_stride",),
         "nothing is compared with validate_param_sync: False"),
    )  # fmt: skip
    for is_read, names, why in groups:
        if not is_read and (given := _changed(runtime, *names)):
            yield [f"runtime.{assignment}" for assignment in given], why


def idle_adapter_keys(model: ModelConfig) -> Iterator[tuple[list[str], str]]:
    """Keys of adapters of a model that has none."""
    why = "only a model that is trained gets adapters"
    if model.trainable:
        why = "without lora_r there are no adapters"
    has_adapters = model.trainable and model.model_args.lora_r > 0
    if not has_adapters and (given := _changed(model.model_args, *LoraArgs.model_fields)):
        yield given, why


def _changed(section: Section, *names: str) -> list[str]:
    """Those of some keys that have another value than the default."""
    defaults = type(section).model_fields
    values = {name: getattr(section, name) for name in names}
    return [f"{name}={one!r}" for name, one in values.items() if one != defaults[name].default]
