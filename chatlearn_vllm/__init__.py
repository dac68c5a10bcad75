"""RLHF of language models: megatron-core trains, vLLM generates, Ray places both.

Names are loaded when first used, so that `import chatlearn_vllm` needs neither torch nor Ray.
"""

import importlib
from typing import Any

from chatlearn_vllm.version import __version__

_EXPORTS = {
    "init": "chatlearn_vllm.runtime.session",
    "load_config": "chatlearn_vllm.config",
    "ConfigError": "chatlearn_vllm.config",
    "BaseModule": "chatlearn_vllm.modules.base",
    "VLLMModule": "chatlearn_vllm.modules.vllm_module",
    "MegatronModule": "chatlearn_vllm.modules.megatron_module",
    "PreferenceModule": "chatlearn_vllm.modules.preference_module",
    "DraftModule": "chatlearn_vllm.modules.draft_module",
    "ValueModule": "chatlearn_vllm.modules.value_module",
    "RewardModule": "chatlearn_vllm.modules.reward_module",
    "HFRewardModule": "chatlearn_vllm.modules.hf_reward_module",
    "BaseEngine": "chatlearn_vllm.runtime.base_engine",
    "RLHFEngine": "chatlearn_vllm.runtime.rlhf_engine",
    "OnlineDPOEngine": "chatlearn_vllm.runtime.online_dpo_engine",
    "GRPOEngine": "chatlearn_vllm.runtime.grpo_engine",
    "SFTEngine": "chatlearn_vllm.runtime.sft_engine",
    "RewardEngine": "chatlearn_vllm.runtime.reward_engine",
    "Engine": "chatlearn_vllm.runtime.flow_engine",
    "Environment": "chatlearn_vllm.runtime.flow_engine",
    "Trainer": "chatlearn_vllm.runtime.flow_engine",
    "Evaluator": "chatlearn_vllm.runtime.evaluator",
    "EvalEngine": "chatlearn_vllm.runtime.eval_engine",
    "apply": "chatlearn_vllm.job.flow",
    "load_prompts": "chatlearn_vllm.data.prompts",
    "PromptPipeline": "chatlearn_vllm.data.prompts",
    "VLLMPromptPipeline": "chatlearn_vllm.data.prompts",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'chatlearn_vllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
