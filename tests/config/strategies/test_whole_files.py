"""Does a strategy file become the job that it describes?"""

import re
from pathlib import Path

import pytest
import yaml

from chatlearn_vllm.config import load_config
from chatlearn_vllm.config.strategies import keys
from chatlearn_vllm.config.strategies.reference import with_tables
from chatlearn_vllm.job import place
from tests.config.strategy_job import args_of

ROOT = Path(__file__).parents[3]
FILES = Path(__file__).parent
SHIPPED = ROOT / "configs/strategies/rlvr_config.yaml"

SAME_JOB = """
models:
  policy:
    device_mapping: [0, 1]
    free_memory: True
    model_args:
      load: llama
      dtype: bfloat16
      seq_length: 64
      max_new_tokens: 24
      num_inference_per_prompt: 4
      temperature: 0.9
      top_p: 1
      block_size: 16
      load_format: dummy
      sleep_level: 1
  policy_trainer:
    device_mapping: [0, 1, 2, 3]
    trainable: True
    free_memory: True
    model_args:
      load: llama
      dtype: bfloat16
      seq_length: 64
      max_new_tokens: 24
      temperature: 0.9
      lr: 5e-5
      weight_decay: 0.0
      lr_decay_style: linear
      loss_agg: seq-mean
  reward_rule:
    num_cpu: 1
    model_args: {user_args: {worker_cls: my.Rule}}
runtime:
  entry_script: examples/megatron/entry/train_rlvr.py
  exp_name: job
  output_dir: ./output
  num_episode: 500
  sample_per_episode: 64
  train_micro_batch_size: 4
  train_global_batch_size: 32
  save_episode_interval: 50
  enable_resume_training: False
  data_path: train.jsonl
"""


def test_the_same_job_in_both_dialects_is_the_same(job, write):
    ours = load_config(write("job/job.yaml", SAME_JOB))
    theirs = load_config(job)
    assert theirs.notices == ()
    same = {"path": "", "notices": ()}
    # Printed, too: a failing comparison of two whole jobs cannot be read.
    assert theirs.model_copy(update=same).model_dump() == ours.model_copy(update=same).model_dump()
    assert theirs.model_copy(update=same) == ours.model_copy(update=same)
    assert place(theirs) == place(ours)


def test_the_example_that_is_shipped_loads_on_its_defaults():
    loaded = load_config(SHIPPED)
    assert place(loaded).describe().splitlines() == [
        "device  share  policy  policy_trainer  reference",
        "0       1/3    0.0     0.0             0.0",
        "1       1/3    1.0     0.1             1.0",
        "no device: reward_math_rule, 1 x 1 CPU",
    ]
    (notice,) = loaded.notices
    assert notice.startswith("actor_infer: top_p=0.99, top_k=100 draws training responses from a")
    assert loaded.entry_script is None or loaded.entry_script.name == "train_rlvr.py"


def test_rolls_example_loads_as_it_is():
    loaded = load_config(FILES / "rlvr.yaml")
    plan = place(loaded).describe().splitlines()
    assert plan[0].split() == [
        "device", "share", "policy", "policy_trainer", "reward_llm_judge",
    ]  # fmt: skip
    assert plan[12].split() == ["11", "1/2", "11.0", "0.11", "-"]
    assert plan[13].split() == ["12", "1/2", "-", "0.12", "0.0"]
    assert plan[17:] == [
        "no device: reward_ifeval, 8 x 1 CPU",
        "no device: reward_math_rule, 8 x 1 CPU",
    ]
    runtime = loaded.runtime
    assert (runtime.sample_per_episode, runtime.train_global_batch_size) == (512, 512)
    assert (runtime.num_episode, runtime.save_episode_interval) == (500, 100)
    assert runtime.eval_data_path == ("data/math_benchmarks.jsonl",)
    assert (runtime.eval_episode_interval, runtime.enable_eval_before_training) == (10, True)
    trainer = loaded.models["policy_trainer"].model_args
    assert (trainer.advantage_estimator, trainer.cliprange_reward) == ("reinforce++", 10)
    assert (trainer.dual_clip, trainer.recompute_granularity) == (1.4, "full")
    assert trainer.save == "/models/qwen2.5-7B-rlvr-config/policy_trainer"
    judge = loaded.models["reward_llm_judge"].model_args
    assert (judge.load_format, judge.seq_length, judge.max_new_tokens) == ("auto", 8000, 100)
    assert judge.user_args["tag_included"] == ["RLVR"]


def test_one_notice_names_the_keys_without_effect_and_why():
    loaded = load_config(FILES / "rlvr.yaml")
    (line,) = [notice for notice in loaded.notices if "no effect of" in notice]
    assert line.startswith(f"{FILES}/rlvr.yaml: no effect of hydra (Hydra does not run the job); ")
    assert "advantage_clip=2.0 (advantages are not clipped" in line
    assert "value_clip=0.5 (only with adv_estimator: gae)" in line
    assert "reference (not started without a KL penalty: use_kl_loss with grpo" in line
    for quiet in ("track_with", "error_max_len_clip", "length_loss_weight", "num_train_epochs"):
        assert quiet not in line  # what they say is what happens


@pytest.mark.parametrize("name", ["lora", "experts", "packing", "batching"])
def test_files_that_change_some_of_it_load_over_it_and_tell_what_has_no_effect(name):
    loaded = load_config(FILES / f"{name}.yaml")
    told = next(notice for notice in loaded.notices if "no effect of" in notice)
    for key, value in yaml.safe_load((FILES / f"{name}.yaml").read_text()).items():
        entry = keys.TOP[key]
        is_told = isinstance(entry, keys.NoEffect) and entry.neutral and value not in entry.neutral
        assert bool(re.search(rf"(?<![\w.]){key}=", told)) == bool(is_told), key


def test_adapters_experts_and_micro_batches_have_our_keys():
    lora = args_of(FILES / "lora.yaml", model="policy_trainer")
    assert (lora.lora_r, lora.lora_alpha) == (32, 32)
    assert lora.target_modules == ("linear_proj", "linear_qkv")
    experts = load_config(FILES / "experts.yaml").models
    assert experts["policy_trainer"].device_mapping == (0, 1, 2, 3, 8, 9, 10, 11)
    assert experts["policy_trainer"].expert_model_parallel_size == 4
    transformer = experts["policy_trainer"].model_args.transformer_args
    assert transformer["recompute_modules"] == ["moe", "layernorm"]
    assert transformer["moe_permute_fusion"] is True
    assert experts["policy"].model_args.sleep_level == 2
    assert (experts["policy"].num_replica, experts["policy"].tensor_model_parallel_size) == (4, 2)
    assert experts["reference"].expert_model_parallel_size == 1
    trainer = experts["policy_trainer"].model_args
    assert (trainer.advantage_estimator, trainer.advantage_std) == ("grpo", True)
    assert trainer.init_kl_coef == 0.001
    packing = args_of(FILES / "packing.yaml", model="policy_trainer")
    assert (packing.sequence_packing, packing.max_tokens_per_micro_batch) == (True, 8192)
    with_reference = ["add_token_level_kl=True", "init_kl_coef=0.1"]
    batching = load_config(FILES / "batching.yaml", with_reference).models
    assert batching["policy_trainer"].model_args.max_tokens_per_micro_batch == 12288
    assert batching["reference"].model_args.max_tokens_per_micro_batch == 49125


def test_the_tables_in_the_documentation_are_up_to_date():
    path = ROOT / "docs/strategies.md"
    document = path.read_text(encoding="utf-8")
    assert document == with_tables(document), (
        f"run: python -m chatlearn_vllm.config.strategies.reference {path.relative_to(ROOT)}"
    )
