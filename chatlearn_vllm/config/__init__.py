"""From a job's yaml to a typed, checked job description; imports no torch, ray or vllm."""

from chatlearn_vllm.config.loader import load_config
from chatlearn_vllm.config.model_args import ModelArgs
from chatlearn_vllm.config.problems import ConfigError, Problem, UserError
from chatlearn_vllm.config.schema import (
    BatchGenerationConfig,
    JobConfig,
    LoraConfig,
    ModelConfig,
    RuntimeConfig,
    RuntimeEnvConfig,
)

__all__ = [
    "BatchGenerationConfig",
    "ConfigError",
    "JobConfig",
    "LoraConfig",
    "ModelArgs",
    "ModelConfig",
    "Problem",
    "RuntimeConfig",
    "RuntimeEnvConfig",
    "UserError",
    "load_config",
]
