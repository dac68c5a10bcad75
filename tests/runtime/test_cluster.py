"""Which Ray does a job run on, and are its ranks where they must be?"""

import os

import pytest

from chatlearn_vllm.config import load_config
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.runtime.cluster import (
    Cluster,
    check_servers_on_one_host,
    existing_cluster,
    remove_sessions,
)
from chatlearn_vllm.runtime.errors import RankId
from chatlearn_vllm.runtime.worker import RankLocation, process_environment
from chatlearn_vllm.runtime.worker_group import RankHandle
from examples.megatron.models.policy_trainer import PolicyTrainer
from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference
from tests.helpers.engines import policy_job
from tests.helpers.tiny_llama import save_tiny_llama


@pytest.fixture
def noted_cluster(tmp_path, monkeypatch):
    """The file in which `ray start` notes its address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_without_a_noted_cluster_there_is_none(noted_cluster):
    assert not existing_cluster()


def test_a_running_cluster_is_found(noted_cluster, ray_address):
    noted_cluster.write_text(ray_address)

    assert existing_cluster()


def test_a_cluster_that_was_killed_is_ignored(noted_cluster):
    noted_cluster.write_text("127.0.0.1:1")

    assert not existing_cluster()


def test_the_user_can_ask_for_a_cluster_or_for_none(noted_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert existing_cluster()

    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not existing_cluster()


@pytest.fixture
def session_logs(tmp_path, monkeypatch):
    """The directory of the logs of a Ray that this process started."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    logs = tmp_path / "ray" / f"session_1_{os.getpid()}" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("what went wrong")
    return logs


def test_logs_of_a_failed_job_are_kept_and_the_session_is_removed(session_logs, tmp_path):
    remove_sessions(tmp_path / "run" / "ray_logs")

    assert (tmp_path / "run" / "ray_logs" / "raylet.out").read_text() == "what went wrong"
    assert not session_logs.parent.exists()


def test_logs_that_cannot_be_kept_stay_and_hide_no_error_of_the_job(session_logs, tmp_path, caplog):
    (tmp_path / "run").write_text("is no directory")

    remove_sessions(tmp_path / "run" / "ray_logs")

    assert (session_logs / "raylet.out").read_text() == "what went wrong"
    assert f"Ray's logs stay in {session_logs}; moving them to" in caplog.text


def test_only_ranks_of_megatron_core_put_all_work_for_their_gpu_in_one_line():
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    of_trainer, of_policy = PolicyTrainer.gpu_environment, VLLMPolicyInference.gpu_environment
    assert process_environment(True, "", "job", of_trainer)[name] == "1"
    assert name not in process_environment(True, "", "job", of_policy)
    assert name not in process_environment(False, "", "job", of_trainer)


def test_a_server_that_the_job_starts_has_its_devices_on_one_host(tmp_path):
    policy = "{num_gpu: 4, model_args: {vllm_server: start, tensor_model_parallel_size: 2}}"
    (tmp_path / "job.yaml").write_text(f"models: {{policy: {policy}, other: {{num_gpu: 2}}}}")
    job = load_config(tmp_path / "job.yaml")

    def check(*hosts, model="policy"):
        check_servers_on_one_host(
            job,
            [
                RankHandle(
                    RankId(model, number // 2, number % 2, 2), None, RankLocation(host, host, 1, 0)
                )
                for number, host in enumerate(hosts)
            ],
        )

    check("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2")
    check("10.0.0.1", "10.0.0.2", model="other")
    with pytest.raises(
        RuntimeError,
        match=r"models.policy: the 2 devices of replica 1 are on 2 hosts \(10.0.0.1, 10.0.0.2\).*"
        r"lower tensor_model_parallel_size=2 x .* or start the server yourself",
    ):
        check("10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2")


def test_an_engine_that_needs_gpus_is_refused_before_its_ranks_start(tmp_path, ray_address):
    save_tiny_llama(tmp_path)
    job = policy_job(tmp_path, tmp_path, quantization="fp8")
    cluster = Cluster(job, [VLLMPolicyInference("policy", job)])
    try:
        with pytest.raises(UserError, match=r"quantised to fp8 .* GPUs only; leave it out \(this"):
            cluster.start()
        assert cluster._ranks == []
    finally:
        cluster.stop()
