"""Which packages does what a job asks for need, and are they here?

Looked at when a job is launched: a plan may be made on another machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlearn_vllm.config.problems import Key
    from chatlearn_vllm.config.schema import ModelConfig, RuntimeEnvConfig

_FLASH_ATTENTION = ("flash_attn", "kernels")
"""From the second Transformers takes flash_attention_2 without the first."""


def missing_packages(
    model: ModelConfig, runtime_env: RuntimeEnvConfig
) -> Iterator[tuple[Key, str]]:
    """Keys that ask for a package that is not installed, and the remedy.

    Args:
        model: any model of the job.
        runtime_env: may bring packages to the workers that are not here.
    """
    if model.trainable or runtime_env.pip:
        return
    args, at = model.model_args, ("models", model.name, "model_args")
    if args.inference_engine == "transformers" and args.attn_implementation == "flash_attention_2":
        if not any(map(importlib.util.find_spec, _FLASH_ATTENTION)):
            yield (
                (*at, "attn_implementation"),
                "needs the package flash_attn, which is not installed; install it, or set sdpa",
            )
    if (
        args.inference_engine == "vllm"
        and (args.speculative_config or {}).get("method") == "suffix"
    ):
        if importlib.util.find_spec("arctic_inference") is None:
            yield (
                (*at, "speculative_config", "method"),
                "needs the package arctic-inference, which is not installed; install it, or set "
                "ngram",
            )
