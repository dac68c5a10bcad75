"""Does a strategy file reach the engine, and does the example that is shipped run?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray import cloudpickle
from vllm import EngineArgs, SamplingParams

from chatlearn_vllm import HFRewardModule, RewardModule
from chatlearn_vllm.config import UserError, load_config
from chatlearn_vllm.engines.vllm_arguments import engine_arguments, sampling_arguments
from chatlearn_vllm.engines.vllm_compat import undisturbed_process
from chatlearn_vllm.layouts import ModelShape
from examples.megatron.entry.train_rlvr import check_tags, reward_class
from examples.megatron.models.arithmetic_reward import ArithmeticReward
from examples.megatron.models.tagged_reward import for_tags
from tests.helpers.tiny_llama import save_tiny_llama

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "configs/strategies/rlvr_config.yaml"
RULE = "rewards.math_rule.worker_cls"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


def test_vllm_gets_what_the_file_says(model_dir):
    config = "actor_infer.strategy_args.strategy_config."
    overrides = [f"pretrain={model_dir}", "actor_infer.model_args.dtype=fp16",
                 f"{config}gpu_memory_utilization=0.8",
                 f"{config}block_size=16", f"{config}max_model_len=200",
                 f"{config}max_num_seqs=8", f"{config}kv_cache_dtype=auto",
                 f"{config}trust_remote_code=True"]  # fmt: skip
    args = load_config(EXAMPLE, overrides).models["policy"].model_args
    shape = ModelShape.from_hf_config(json.loads((model_dir / "config.json").read_text()))
    kwargs, _ = engine_arguments(args, model_dir, shape, seed=3, on_gpu=True)
    wanted = {
        "dtype": "float16", "gpu_memory_utilization": 0.8, "block_size": 16, "max_model_len": 200,
        "max_num_seqs": 8, "load_format": "dummy", "kv_cache_dtype": "auto",
        "trust_remote_code": True,
        "enable_sleep_mode": True, "tensor_parallel_size": 1,
    }  # fmt: skip
    assert {name: kwargs[name] for name in wanted} == wanted


@pytest.fixture
def same_environment():
    """What vLLM sets for its processes, LD_PRELOAD among it, is none of the other tests'."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_vllm_configures_its_engine_as_the_file_says(model_dir, same_environment):
    config = "actor_infer.strategy_args.strategy_config."
    overrides = [f"pretrain={model_dir}", f"{config}gpu_memory_utilization=0.8",
                 f"{config}block_size=64", f"{config}max_model_len=200", f"{config}max_num_seqs=8",
                 f"{config}trust_remote_code=True", f"{config}load_format=null"]  # fmt: skip
    args = load_config(EXAMPLE, overrides).models["policy"].model_args
    shape = ModelShape.from_hf_config(json.loads((model_dir / "config.json").read_text()))
    kwargs, _ = engine_arguments(args, model_dir, shape, seed=3, on_gpu=False)
    with undisturbed_process():
        made = EngineArgs(**kwargs).create_engine_config()
    assert made.model_config.max_model_len == 200
    assert made.model_config.trust_remote_code
    assert made.model_config.seed == 3
    assert made.load_config.load_format == "dummy"
    assert made.scheduler_config.max_num_seqs == 8
    cache = made.cache_config
    assert (cache.block_size, cache.gpu_memory_utilization) == (64, 0.8)


def test_vllm_samples_as_the_file_says():
    generating = "actor_infer.generating_args."
    overrides = [f"{generating}stop_strings=['x', 'y']", f"{generating}repetition_penalty=1.2",
                 f"{generating}min_tokens=2", f"{generating}logprobs=1"]  # fmt: skip
    args = load_config(EXAMPLE, overrides).models["policy"].model_args
    wanted = {
        "top_p": 0.99, "top_k": 100, "temperature": 0.99, "n": 8, "repetition_penalty": 1.2,
        "stop": ["x", "y"], "include_stop_str_in_output": True, "min_tokens": 2, "logprobs": 1,
    }  # fmt: skip
    sampling = sampling_arguments(args, is_eval=False)
    assert {name: sampling[name] for name in wanted} == wanted
    assert args.max_new_tokens == 24
    taken = SamplingParams(**sampling, max_tokens=args.max_new_tokens)
    assert {name: getattr(taken, name) for name in wanted} == wanted
    evaluation = sampling_arguments(args, is_eval=True)
    assert (evaluation["temperature"], evaluation["top_p"], evaluation["n"]) == (0, 1, 1)


def test_a_reward_scores_the_records_of_its_tags(tmp_path):
    job = load_config(EXAMPLE, ["rewards.math_rule.tag_included=[sum]",
                                "rewards.math_rule.reward_weight=0.5"])  # fmt: skip
    # Ranks get the class itself: it cannot be imported there.
    made = cloudpickle.loads(cloudpickle.dumps(reward_class(job.models["reward_math_rule"])))
    reward = made("reward_math_rule", job)
    data = {"str_outputs": ["5", "5", "4"], "answer": ["5", "5", "5"], "tag": ["sum", "x", "sum"]}
    torch.testing.assert_close(reward.forward_step(data)["rewards"], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(reward.eval_forward(data)["rewards"], torch.tensor([1.0, 0.0, 0.0]))
    none_of_them = {**data, "tag": ["x", "x", "x"]}
    torch.testing.assert_close(reward.forward_step(none_of_them)["rewards"], torch.zeros(3))
    assert for_tags(ArithmeticReward).__name__ == "TaggedArithmeticReward"


@pytest.mark.parametrize(
    ("strategy_name", "cls"), [("hf_infer", HFRewardModule), ("megatron_infer", RewardModule)]
)
def test_a_reward_without_a_class_scores_as_its_strategy_says(strategy_name, cls):
    role = f"{{strategy_args: {{strategy_name: {strategy_name}}}, device_mapping: [0]}}"
    job = load_config(EXAMPLE, [f"rewards.judge={role}", "reward_pretrain=DIR"])
    assert reward_class(job.models["reward_judge"]) is cls


def test_a_reward_of_transformers_without_devices_is_on_cpus():
    role = "{strategy_args: {strategy_name: hf_infer}}"
    judge = load_config(EXAMPLE, [f"rewards.judge={role}", "reward_pretrain=DIR"]).models[
        "reward_judge"
    ]
    assert (judge.num_gpu, judge.num_cpu) == (0, 1)
    assert reward_class(judge) is HFRewardModule


def test_records_without_the_tag_that_a_reward_chooses_by_are_told():
    job = load_config(EXAMPLE, ["rewards.math_rule.tag_included=[sum]"])
    check_tags(job, [{"prompt": "1+1=", "tag": "sum"}], "a.jsonl")
    for second in ({"prompt": "1+2="}, {"prompt": "1+2=", "tag": None}):
        with pytest.raises(UserError, match=r"math_rule.tag_included=\['sum'\]: record 2 of b.js"):
            check_tags(job, [{"prompt": "1+1=", "tag": "sum"}, second], "b.jsonl")
    check_tags(load_config(EXAMPLE), [{"prompt": "1+2="}], "c.jsonl")


@pytest.mark.parametrize(
    ("worker_cls", "problem"),
    [
        ("roll.pipeline.rlvr.rewards.math_rule_reward_worker.MathRuleRewardWorker",
         "No module named 'roll'"),
        ("examples.megatron.models.arithmetic_reward.NoSuchReward", "has no attribute"),
        ("json.JSONDecoder", "is no BaseModule"),
        ("score", "Empty module name"),
        ("None", "rewards.math_rule: no worker_cls says how it scores"),
    ],
)  # fmt: skip
def test_a_reward_needs_a_class_of_the_user(worker_cls, problem):
    # With a script of one's own: what the file alone shows is refused with that of the example.
    overrides = [f"{RULE}={worker_cls}", "entry_script=mine.py"]
    model = load_config(EXAMPLE, overrides).models["reward_math_rule"]
    with pytest.raises(ValueError, match="rewards.math_rule") as error:
        reward_class(model)
    assert problem in str(error.value)
    assert "name a class of yours as package.module.Class" in str(error.value)


@pytest.mark.slow
def test_the_example_runs_with_other_devices_for_the_trainer(model_dir, tmp_path):
    prompts = [json.dumps({"prompt": f"{i}+{i}=", "note": i}) for i in range(16)]
    training, evaluation = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    training.write_text("\n".join(prompts))
    evaluation.write_text("\n".join(prompts[:2]))
    overrides = [
        f"pretrain={model_dir}", f"output_dir={tmp_path}", "max_steps=2", "eval_steps=1",
        "rollout_batch_size=8", f"validation.data_args.file_name={evaluation}",
        f"actor_train.data_args.file_name={training}",
        f"{RULE}=tests.helpers.job_modules.DigitReward",
        "actor_train.training_args.per_device_train_batch_size=16",
        "actor_train.training_args.gradient_accumulation_steps=2",
        "actor_train.training_args.warmup_steps=0",
        # Devices 0 and 1 are shared, device 2 is the policy's own.
        "actor_train.device_mapping=[0, 1]", "actor_infer.device_mapping=list(range(0,3))",
        "actor_infer.generating_args.top_p=1", "actor_infer.generating_args.top_k=-1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "chatlearn_vllm.cli.main", "launch", str(EXAMPLE), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    lines = (tmp_path / "rlvr/metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert [metrics["episode"] for metrics in history] == [0, 1, 2]
    num_bytes = {metrics["sync/bytes"] for metrics in history[1:]}
    assert len(num_bytes) == 1 and num_bytes.pop() % 3 == 0  # three replicas
    for metrics in history[1:]:
        assert metrics["train/logprob_abs_diff_max"] < 1e-3
        assert metrics["train/grad_norm"] > 0
        assert metrics["eval/num_samples"] == 2
    assert history[2]["train/kl"] > 0
