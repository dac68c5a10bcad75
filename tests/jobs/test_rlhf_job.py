"""Does a PPO job with all six roles run, and go on bitwise after it was killed? All parts real."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from chatlearn_vllm.observability.metrics import read_metrics
from tests.helpers.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.slow  # three jobs of twelve processes

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = textwrap.dedent("""
    import chatlearn_vllm
    from chatlearn_vllm import RLHFEngine
    from examples.megatron.models.policy_reference import PolicyReference
    from examples.megatron.models.policy_trainer import PolicyTrainer
    from examples.megatron.models.reward_inference import RewardInference
    from examples.megatron.models.value_model import ValueInference, ValueTrainer
    from tests.helpers.job_modules import CountingPolicy

    directory = chatlearn_vllm.init().runtime.run_dir


    class Policy(PolicyTrainer):
        def shutdown(self):
            self.onload(optimizer=False, grads=False)
            self.save_hf(directory / "policy")
            super().shutdown()


    class Value(ValueTrainer):
        def shutdown(self):
            self.onload(optimizer=False, grads=False)
            self.save_hf(directory / "value")
            super().shutdown()


    engine = RLHFEngine(
        CountingPolicy("policy"), PolicyReference("reference"), RewardInference("reward"),
        ValueInference("value"), Policy("ppo_policy"), Value("ppo_value"),
    )
    engine.set_dataset([{"prompt": f"{i}+{i}="} for i in range(10, 26)])
    engine.learn()
""")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    save_tiny_llama(root / "policy")
    save_tiny_llama(root / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(root / "reward", num_labels=1)
    model.score.weight.data.normal_(std=0.5)
    model.save_pretrained(root / "reward")
    return {"policy": root / "policy", "reward": root / "reward"}


def write_job(directory: Path, models: dict[str, Path], **runtime) -> Path:
    common = {"load": str(models["policy"]), "seq_length": 32, "max_new_tokens": 12, "seed": 3}
    learning = {"lr": 1e-3, "clip_grad": 1.0, "use_distributed_optimizer": True}
    trained = {"num_gpu": 2, "trainable": True, "free_memory": True}
    frozen = {"num_gpu": 2, "free_memory": True}
    job = {
        "models": {
            "policy": frozen | {"model_args": common | {"n": 4, "max_num_seqs": 16}},
            "reference": frozen | {"model_args": common},
            "reward": frozen | {"model_args": common | {"load": str(models["reward"])}},
            "value": frozen | {"model_args": common | {"tensor_model_parallel_size": 2}},
            "ppo_policy": trained | {
                "model_args": common | learning | {
                    "init_kl_coef": 0.05, "fix_kl_coef": False, "target": 0.01, "horizon": 100,
                },
            },
            "ppo_value": trained | {
                "model_args": common | learning | {"tensor_model_parallel_size": 2},
            },
        },
        "runtime": {
            "num_episode": 3, "sample_per_episode": 32, "train_micro_batch_size": 8,
            "train_global_batch_size": 16, "output_dir": str(directory), "exp_name": "run",
            "save_episode_interval": 1, "enable_resume_training": True,
            "colocation": ["policy,reference,reward,value,ppo_policy,ppo_value"], **runtime,
        },
    }  # fmt: skip
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def start(directory: Path, job: Path) -> subprocess.Popen:
    script = directory / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with (directory / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, str(script), "-c", str(job)],
            cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def finish(directory: Path, job: Path) -> list[dict[str, float]]:
    process = start(directory, job)
    try:
        assert process.wait(timeout=900) == 0, (directory / "output.txt").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return read_metrics(directory / "run" / "metrics.jsonl")[1:]  # of episode 0: the first sync


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {
        key: value
        for key, value in metrics.items()
        if not key.startswith(("time/", "sync/seconds")) and "_per_s" not in key
    }


def weights(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.glob("run/*/*.safetensors"))
    }


def test_a_job_that_was_killed_goes_on_to_the_same_metrics_and_weights(models, tmp_path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = finish(tmp_path / "whole", write_job(tmp_path / "whole", models))

    assert [metrics["episode"] for metrics in whole] == [1, 2, 3]
    for metrics in whole:
        assert metrics["train/logprob_abs_diff_max"] < 1e-3
        assert metrics["train/grad_norm"] > 0 and metrics["ppo_value/grad_norm"] > 0
    assert whole[0]["rollout/value_mean"] == 0  # the head starts at zero
    assert whole[1]["rollout/value_mean"] != 0  # and what was learned has reached `value`
    assert whole[0]["rollout/kl_coef"] != whole[2]["rollout/kl_coef"]
    assert whole[2]["rollout/kl_to_reference"] > 0
    assert whole[0]["ppo_value/explained_variance"] != whole[2]["ppo_value/explained_variance"] <= 1

    job = write_job(tmp_path / "parts", models)
    process = start(tmp_path / "parts", job)
    state = tmp_path / "parts" / "run" / "checkpoints" / "driver" / "episode_00000001.json"
    try:
        while not state.exists():
            assert process.poll() is None, (tmp_path / "parts" / "output.txt").read_text()
            try:
                process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                continue
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads(state.read_text())["episode"] == 1
    # The line of an episode is written when it is over, a moment after its checkpoint.
    parts = finish(tmp_path / "parts", job)[-2:]

    for one, other in zip(whole[1:], parts, strict=True):
        assert without_times(one) == without_times(other)
    assert len(weights(tmp_path / "whole")) == 2
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
