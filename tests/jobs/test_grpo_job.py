"""Does a GRPO job run from its yaml? Real Ray, vLLM and megatron-core, weights really moving."""

import json
from pathlib import Path

import pytest
import yaml

from chatlearn_vllm import Evaluator, GRPOEngine, load_config
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.job_modules import CountingPolicy, DigitReward
from tests.helpers.tiny_llama import save_tiny_llama

PROMPTS = [{"prompt": f"{i}+{i}=", "note": f"n{i}"} for i in range(10, 26)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


def write_job(
    directory: Path, model_dir: Path, *, policy, trainer, reference=None, draft=None, num_gpu=2,
    **runtime,
):  # fmt: skip
    common = {"load": str(model_dir), "seq_length": 32, "max_new_tokens": 12, "seed": 3}
    common["bf16"] = True  # on CPU both sides take float32 instead
    sampling = {"n": 4, "temperature": 0.8, "max_num_seqs": 16, "eval_temperature": 0.0}
    learning = {"lr": 1e-3, "temperature": 0.8, "clip_grad": 1.0}
    models = {
        "policy": {
            "num_gpu": num_gpu, "free_memory": True, "model_args": common | sampling | policy,
        },
        "reward": {"num_cpu": 1},
        "policy_trainer": {
            "num_gpu": num_gpu, "trainable": True, "free_memory": True,
            "model_args": common | learning | trainer,
        },
    }  # fmt: skip
    if reference is not None:
        models["reference"] = {"num_gpu": num_gpu, "model_args": common | {"temperature": 0.8}}
    if draft is not None:
        models["draft_trainer"] = models["policy_trainer"] | {
            "model_args": common | learning | draft
        }
    job = {
        "models": models,
        "runtime": {
            "num_episode": 2, "sample_per_episode": 32, "train_micro_batch_size": 8,
            "train_global_batch_size": 16, "output_dir": str(directory), "exp_name": "run",
            "eval_episode_interval": 1, "enable_eval_before_training": True, **runtime,
        },
    }  # fmt: skip
    for name, model in models.items():
        if "model_args" in model:
            (directory / f"{name}.yaml").write_text(yaml.safe_dump(model.pop("model_args")))
            model["model_config_file"] = f"{name}.yaml"
    (directory / "job.yaml").write_text(yaml.safe_dump(job))
    return load_config(directory / "job.yaml")


def run(job) -> list[dict[str, float]]:
    policy, reward = CountingPolicy("policy", job), DigitReward("reward", job)
    trainer = PolicyTrainer("policy_trainer", job)
    reference = PolicyReference("reference", job) if "reference" in job.models else None
    engine = GRPOEngine(policy, reference, reward, trainer)
    engine.set_dataset(PROMPTS)
    engine.set_evaluator(Evaluator(policy, reward, PROMPTS[:4]))
    return engine.learn()


def check_history(history, directory: Path, num_parameters: int, num_rollout_copies: int) -> None:
    assert [metrics["episode"] for metrics in history] == [0, 1, 2]
    assert [metrics["sync/weight_version"] for metrics in history] == [1, 2, 3]
    assert [metrics["rollout/weight_version"] for metrics in history[1:]] == [1, 2]
    for metrics in history[1:]:
        # The engine computed with exactly the trainer's weights: fp32 on both sides.
        assert metrics["train/logprob_abs_diff_mean"] < 1e-4
        assert metrics["train/logprob_abs_diff_max"] < 1e-3
        assert metrics["sync/bytes"] == 4 * num_parameters * num_rollout_copies
        assert metrics["train/grad_norm"] > 0
        assert 0 <= metrics["rollout/reward_mean"] <= 1
        assert metrics["rollout/tokens_per_s"] > 0
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["episode"] for line in lines] == [0, 1, 2]
    assert list((directory / "run").rglob("events.out.tfevents.*"))


NUM_PARAMETERS = 2 * 100 * 64 + 64 + 2 * (256 * 64 + 64 * 128 + 2 * 96 * 64 + 64 * 96 + 2 * 64)


def colocated_job(directory: Path, model_dir: Path, **runtime):
    return write_job(
        directory, model_dir, policy={}, trainer={"init_kl_coef": 0.05}, reference={},
        colocation=["policy,policy_trainer,reference"], **runtime,
    )  # fmt: skip


def test_colocated_job_with_reference_and_two_replicas(model_dir, tmp_path) -> None:
    history = run(colocated_job(tmp_path, model_dir))
    check_history(history, tmp_path, NUM_PARAMETERS, num_rollout_copies=2)
    # At first the policy is its reference; after an update it is not.
    assert history[2]["train/kl"] > 0


@pytest.mark.slow  # test_grpo_resume.py compares two jobs in every run
def test_a_job_repeats_itself(model_dir, tmp_path) -> None:
    first, second = (
        run(colocated_job(tmp_path, model_dir, exp_name=name)) for name in ("once", "again")
    )
    for metrics, repeated in zip(first, second, strict=True):
        for key in metrics:
            if not key.startswith(("time/", "sync/seconds")) and "_per_s" not in key:
                assert metrics[key] == repeated[key], key


def test_tensor_parallel_trainer_feeds_a_pipeline_of_engines_on_other_devices(
    model_dir, tmp_path
) -> None:
    job = write_job(
        tmp_path, model_dir,
        policy={"pipeline_model_parallel_size": 2},
        trainer={"tensor_model_parallel_size": 2, "sequence_parallel": True},
    )  # fmt: skip
    check_history(run(job), tmp_path, NUM_PARAMETERS, num_rollout_copies=1)
