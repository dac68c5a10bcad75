"""Do files made for ChatLearn load as they are, and is each key's effect, or its lack, told?"""

from pathlib import Path

import pytest
import yaml

from chatlearn_vllm.config import load_config
from chatlearn_vllm.config.accepted_args import (
    LoggingArgs,
    MegatronArgs,
    RetiredArgs,
    UnusedArgs,
)
from chatlearn_vllm.config.model_args import ModelArgs

FILES = Path(__file__).parent / "chatlearn"
NAMES = {path.stem: yaml.safe_load(path.read_text()) for path in FILES.glob("*.yaml")}
JOBS = sorted(name for name, values in NAMES.items() if "models" in values)
MODEL_FILES = sorted(
    name for name, values in NAMES.items() if not {"models", "runtime"} & {*values}
)
PATHS = {
    "policy_inference_load": "llama",
    "reward_load": "reward",
    "tokenizer_load": "llama",
    "tokenizer_model": "llama/tokenizer.model",
    "data_path": "train.jsonl",
    "output_dir": "output",
}
LLAMA2_7B = {
    **{f"{model}_num_layers": "32" for model in ("policy", "reward")},
    **{f"{model}_hidden_size": "4096" for model in ("policy", "reward")},
    **{f"{model}_ffn_hidden_size": "11008" for model in ("policy", "reward")},
    **{f"{model}_num_attention_heads": "32" for model in ("policy", "reward")},
    **{f"{model}_num_query_groups": "32" for model in ("policy", "reward")},
    **{f"num_gpu_{name}": "8" for name in ("policy", "ref", "reward", "value", "ppo_policy")},
    **{"num_gpu": "8", "num_device": "8", "policy_tp": "4", "reward_tp": "4"},
    **{"train_global_batch_size": "128", "generation_batch_size": "512"},
    **{"max_num_batched_tokens": "65536", "gpu_memory_utilization": "0.9"},
}
"""What ChatLearn's train_rlhf_llama.sh exports for this model, and on 8 GPUs."""


@pytest.fixture
def environment(monkeypatch):
    """What ChatLearn's scripts set; some variables without a default they do not."""
    for name, value in (PATHS | LLAMA2_7B).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("policy_file", ["vllm.yaml", "policy_on_megatron.yaml"])
@pytest.mark.parametrize("name", JOBS)
def test_jobs_load(environment, monkeypatch, name, policy_file):
    monkeypatch.setenv("policy_file", policy_file)
    job = load_config(FILES / f"{name}.yaml")
    assert job.models["policy"].tensor_model_parallel_size == 4
    assert job.models["policy"].num_replica == 2


@pytest.mark.parametrize("name", MODEL_FILES)
def test_every_key_of_a_model_file_has_its_effect_or_is_named(environment, write, name):
    path = write(
        "job.yaml", f"models: {{m: {{num_gpu: 8, model_config_file: {FILES}/{name}.yaml}}}}"
    )
    job = load_config(path)
    args = job.models["m"].model_args
    told = {
        assignment.partition("=")[0]
        for notice in job.notices
        if notice.startswith("models.m: no effect of ")
        for assignment in notice.removeprefix("models.m: no effect of ").split(", ")
    }
    idle = {
        key: field.default
        for group in (MegatronArgs, UnusedArgs, LoggingArgs, RetiredArgs)
        for key, field in group.model_fields.items()
    }
    given = [key for key in NAMES[name] if key in args and key in args.model_fields_set]
    assert given
    for key in given:
        assert (key in told) == (key in idle and args[key] != idle[key]), key


def test_without_its_variable_a_key_is_left_out_and_named(monkeypatch):
    for name in PATHS | LLAMA2_7B:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("policy_inference_load", "llama")
    job = load_config(FILES / "rlhf.yaml")
    args = job.models["reference"].model_args
    assert (args.load, args.num_layers, args.prompt_key) == ("llama", None, "prompt")
    assert job.models["reward"].model_args.load == "llama"  # what it includes has a value
    (line,) = [line for line in job.notices if line.startswith(f"{FILES}/rlhf.yaml")]
    assert "left out, as the environment variables are not set: " in line
    assert "runtime.data_path=${data_path}" in line and "runtime.output_dir=${output_dir}" in line
    (line,) = [line for line in job.notices if line.startswith(f"{FILES}/megatron.yaml")]
    assert "num_layers=${policy_num_layers}, hidden_size=${policy_hidden_size}" in line


def test_a_key_that_stands_twice_takes_its_last_value_and_is_named(environment, monkeypatch):
    job = load_config(FILES / "rlhf.yaml")
    assert job.models["ppo_policy"].model_args.recompute_granularity is None
    assert [line.rpartition("/")[2] for line in job.notices if " twice" in line] == [
        "vllm.yaml: line 46: key 'apply_replica_id_to_seed' is given twice; the last one counts",
        "trainer.yaml: line 17: key 'recompute_granularity' is given twice; the last one counts",
    ]


def test_values_in_megatrons_spelling_have_their_effect(environment, monkeypatch):
    monkeypatch.setenv("policy_file", "policy_on_megatron.yaml")
    monkeypatch.setenv("policy_recompute_activations", "True")
    models = load_config(FILES / "rlhf.yaml").models
    policy, trainer = models["policy"].model_args, models["ppo_policy"].model_args
    assert (policy.eval_top_p, policy.eval_top_k, policy.top_k) == (1.0, 1, 0)
    assert policy.dtype == "bfloat16"
    assert policy.scale_reward is None  # "None" in quotes
    assert trainer.recompute_granularity == "selective"
    assert trainer.sequence_parallel


def test_dropout_has_no_effect_and_is_told(environment):
    job = load_config(FILES / "rlhf.yaml")
    assert not {"hidden_dropout", "attention_dropout"} & {
        *job.models["ppo_policy"].model_args.transformer_args
    }
    told = [line for line in job.notices if "hidden_dropout=0.1, attention_dropout=0.1" in line]
    assert len(told) == 1 and told[0].startswith("models.ppo_policy")


def test_sequence_parallelism_ends_with_one_tensor_parallel_rank(environment, monkeypatch):
    monkeypatch.setenv("policy_tp", "1")
    job = load_config(FILES / "online_dpo.yaml")
    assert not job.models["ppo_policy"].model_args.sequence_parallel
    assert (
        "models.ppo_policy: no effect of sequence_parallel=True with tensor parallel size 1"
        in job.notices
    )


def test_what_several_models_set_alike_is_told_once(environment):
    notices = load_config(FILES / "rlhf.yaml").notices
    (line,) = [line for line in notices if "hysteresis=2" in line]
    assert line.startswith(
        "models.policy, models.reference, models.reward, models.value, models.ppo_policy, "
        "models.ppo_value: no effect of "
    )
    assert line.endswith("; docs/configuration.md says what each of them follows from")


def test_keys_of_the_loggers_are_all_of_the_schema():
    assert NAMES["mcore_grpo"].keys() >= LoggingArgs.model_fields.keys()
    assert LoggingArgs.model_fields.keys() <= ModelArgs.model_fields.keys()
