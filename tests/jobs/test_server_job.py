"""Does a GRPO job run whose policy generates with a server that the job starts, and is all gone
when the job is?
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from chatlearn_vllm import GRPOEngine, load_config
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.job_modules import CountingPolicy, DigitReward
from tests.helpers.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.slow

PROMPTS = [{"prompt": f"{i}+{i}=", "note": f"n{i}"} for i in range(10, 26)]


def write_job(directory: Path, tp: int) -> Path:
    (directory / "model").mkdir()
    save_tiny_llama(directory / "model")
    common = {"load": str(directory / "model"), "seq_length": 32, "max_new_tokens": 12, "seed": 3}
    policy = {
        "vllm_server": "start", "use_vllm": True, "num_generations": 4, "temperature": 0.8,
        "max_num_seqs": 16, "tensor_model_parallel_size": tp,
    }  # fmt: skip
    devices = {"num_cpu": 1} if tp == 1 else {"num_gpu": tp}
    trainer = {"lr": 1e-3, "temperature": 0.8, "bf16": True}
    job = {
        "models": {
            "policy": devices | {"model_args": common | policy},
            "reward": {"num_cpu": 1},
            "policy_trainer": {"num_gpu": 1, "trainable": True, "model_args": common | trainer},
        },
        "runtime": {
            "num_episode": 2, "sample_per_episode": 16, "train_micro_batch_size": 8,
            "train_global_batch_size": 16, "output_dir": str(directory), "exp_name": "run",
        },
    }  # fmt: skip
    (directory / "job.yaml").write_text(yaml.safe_dump(job))
    return directory / "job.yaml"


def learn(path: str) -> None:
    job = load_config(path)
    engine = GRPOEngine(
        CountingPolicy("policy", job),
        None,
        DigitReward("reward", job),
        PolicyTrainer("policy_trainer", job),
    )
    engine.set_dataset(PROMPTS)
    print(json.dumps(engine.learn()), flush=True)


def servers(directory: Path) -> list[psutil.Process]:
    """Processes of servers that serve the model of this directory, and their watches."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "chatlearn_vllm.engines.vllm_serve" in line and str(directory / "model") in line:
            found += [process, *process.children(recursive=True)]
    return found


def start(directory: Path, tp: int = 1) -> subprocess.Popen:
    path = str(write_job(directory, tp))
    command = f"from tests.jobs.test_server_job import learn; learn({path!r})"
    return subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_a_job_trains_on_what_its_server_generates(tmp_path, tp) -> None:
    driver = start(tmp_path, tp)
    output, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0
    history = json.loads(output.splitlines()[-1])
    assert [metrics["sync/weight_version"] for metrics in history] == [1, 2, 3]
    for metrics in history[1:]:
        # The server computed with exactly the trainer's weights: fp32 on both sides.
        assert metrics["train/logprob_abs_diff_max"] < 1e-3
        assert metrics["train/grad_norm"] > 0
    assert not servers(tmp_path)
    assert "POST /v1/completions" in (tmp_path / "run/vllm_server/policy-0.log").read_text()


def test_a_killed_job_leaves_no_server(tmp_path) -> None:
    driver = start(tmp_path)
    try:
        deadline = time.monotonic() + 200
        while len(servers(tmp_path)) < 3:  # watch, API server, engine
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        processes = servers(tmp_path)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    deadline = time.monotonic() + 60
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() < deadline, [p.cmdline()[:6] for p in processes if p.is_running()]
        time.sleep(0.2)
