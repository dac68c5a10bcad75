"""Does a GRPO job that was killed go on to the very bits of one that was not? All parts real."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatlearn_vllm import GRPOEngine, load_config
from chatlearn_vllm.observability.metrics import read_metrics
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.job_modules import CountingPolicy, DigitReward
from tests.helpers.tiny_llama import save_tiny_llama

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = textwrap.dedent("""
    import chatlearn_vllm
    from chatlearn_vllm import GRPOEngine
    from examples.megatron.models.policy_trainer import PolicyTrainer
    from tests.helpers.job_modules import CountingPolicy, DigitReward

    chatlearn_vllm.init()
    engine = GRPOEngine(
        CountingPolicy("policy"), None, DigitReward("reward"), PolicyTrainer("policy_trainer")
    )
    engine.set_dataset([{"prompt": f"{i}+{i}=", "note": ""} for i in range(10, 26)])
    engine.learn()
""")
EPISODES = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


def write_job(directory: Path, model_dir: Path, **runtime: Any) -> Path:
    common = {"load": str(model_dir), "seq_length": 32, "max_new_tokens": 12, "seed": 3}
    job = {
        "models": {
            "policy": {
                "num_gpu": 1, "free_memory": True,
                "model_args": common | {"n": 4, "max_num_seqs": 16},
            },
            "reward": {"num_cpu": 1},
            "policy_trainer": {
                "num_gpu": 1, "trainable": True, "free_memory": True,
                "model_args": common | {"lr": 1e-3, "clip_grad": 1.0},
            },
        },
        "runtime": {
            "num_episode": EPISODES, "sample_per_episode": 32, "train_micro_batch_size": 8,
            "train_global_batch_size": 16, "output_dir": str(directory), "exp_name": "run",
            "save_episode_interval": 1, "max_ckpt_to_keep": 2,
            "colocation": ["policy,policy_trainer"], **runtime,
        },
    }  # fmt: skip
    directory.mkdir()
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


def wait(process: subprocess.Popen, directory: Path) -> None:
    try:
        assert process.wait(timeout=400) == 0, (directory / "output.txt").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def kill_when(process: subprocess.Popen, paths: list[Path], directory: Path) -> None:
    """SIGKILL a job and what it started as soon as one of the paths is there."""
    try:
        while not any(path.exists() for path in paths):
            assert process.poll() is None, (directory / "output.txt").read_text()
            try:
                process.wait(timeout=0.005)
            except subprocess.TimeoutExpired:
                continue
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_job_goes_on_to_the_same_metrics_weights_and_optimizer(model_dir, tmp_path):
    """The one that is killed also writes its checkpoints in the background."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wait(start(whole, write_job(whole, model_dir)), whole)
    assert sorted(path.name for path in checkpoints(whole, "policy_trainer").iterdir()) == [
        "iter_0000002", "iter_0000003", "latest",
    ]  # fmt: skip
    assert sorted(path.stem for path in checkpoints(whole, "driver").iterdir()) == [
        "episode_00000002", "episode_00000003",
    ]  # fmt: skip

    job = write_job(parts, model_dir, async_save=True)
    second = checkpoints(parts, "policy_trainer") / "iter_0000002"
    unfinished = second.with_name(".iter_0000002.writing")
    kill_when(start(parts, job), [second, unfinished], parts)
    assert (checkpoints(parts, "driver") / "episode_00000001.json").exists()
    wait(start(parts, job), parts)

    lines = [without_times(line) for line in read_metrics(whole / "run" / "metrics.jsonl")]
    assert [line["episode"] for line in lines] == [0, 1, 2, 3]
    assert all(line["train/grad_norm"] > 0 for line in lines[1:])
    assert lines == [without_times(line) for line in read_metrics(parts / "run" / "metrics.jsonl")]
    assert len(tensor_files(whole)) > 1
    assert tensor_files(whole) == tensor_files(parts)

    (checkpoints(parts, "policy_trainer") / "iter_0000003" / "common.pt").unlink()
    with pytest.raises(ValueError) as error:
        resume_in_this_process(job)
    assert "iter_0000003: common.pt is missing" in str(error.value)
    assert "runtime.load_data_checkpoint_iteration: 2 goes on" in str(error.value)


def resume_in_this_process(path: Path) -> None:
    job = load_config(path, ["runtime.num_episode=4"])
    policy, reward = CountingPolicy("policy", job), DigitReward("reward", job)
    engine = GRPOEngine(policy, None, reward, PolicyTrainer("policy_trainer", job))
    engine.set_dataset([{"prompt": "1+1=", "note": ""}] * 16)
    engine.learn()


def checkpoints(directory: Path, name: str) -> Path:
    return directory / "run" / "checkpoints" / name


def tensor_files(directory: Path) -> dict[str, bytes]:
    """Weights and optimizer states after the last episode."""
    last = checkpoints(directory, "policy_trainer") / f"iter_{EPISODES:07d}"
    return {path.name: path.read_bytes() for path in sorted(last.glob("*.distcp"))}


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {
        key: value
        for key, value in metrics.items()
        if not key.startswith("time/") and not key.endswith("seconds") and "_per_s" not in key
    }
