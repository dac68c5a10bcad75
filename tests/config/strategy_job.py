"""A small strategy file, and what loading it gives."""

from pathlib import Path

import pytest

from chatlearn_vllm.config import ConfigError, load_config
from chatlearn_vllm.config.model_args import ModelArgs

JOB = """
rollout_batch_size: 16
num_return_sequences_in_group: 4
prompt_length: 40
response_length: 24
adv_estimator: grpo
pretrain: llama
actor_train:
  training_args: {per_device_train_batch_size: 4, gradient_accumulation_steps: 2}
  data_args: {file_name: train.jsonl}
  strategy_args: {strategy_name: megatron_train}
  device_mapping: list(range(0,4))
actor_infer:
  generating_args: {max_new_tokens: "${response_length}", temperature: 0.9, top_p: 1, top_k: -1}
  strategy_args: {strategy_name: vllm, strategy_config: {block_size: 16}}
  device_mapping: list(range(0,2))
rewards:
  rule: {worker_cls: my.Rule}
"""

CRITIC = """
critic:
  model_args: {model_name_or_path: critic}
  training_args:
    {learning_rate: 1e-5, per_device_train_batch_size: 4, gradient_accumulation_steps: 4}
  strategy_args: {strategy_name: megatron_train}
  device_mapping: "[0, 1]"
"""
"""A role that an estimator of advantages adds to JOB."""

ACTOR = "actor_train."
REFERENCE = [
    "reference.strategy_args.strategy_name=megatron_infer",
    "reference.device_mapping=[0]",
]
"""A role that JOB does not have."""
INFER = "actor_infer.generating_args."
CONFIG = "actor_infer.strategy_args.strategy_config."
TRAIN = "actor_train.training_args."


def problems_of(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """One line for each problem of a file, without the directory."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    prefix = f"{path.parent}/"
    return [str(problem).replace(prefix, "") for problem in error.value.problems]


def args_of(
    path: Path, overrides: list[str] | tuple[str, ...] = (), model: str = "policy"
) -> ModelArgs:
    """The arguments of one of its models."""
    return load_config(path, overrides).models[model].model_args
