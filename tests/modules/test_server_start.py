"""With which arguments and variables does a job start a server?"""

from chatlearn_vllm.engines.server_start import server_arguments, server_environment


def test_a_server_starts_the_processes_of_a_replica_itself() -> None:
    of_an_engine = {
        "model": "/m", "tensor_parallel_size": 2, "distributed_executor_backend": "external",
        "disable_log_stats": True,
    }  # fmt: skip
    assert server_arguments(of_an_engine, given={}) == {"tensor_parallel_size": 2}
    assert server_arguments(of_an_engine, given={"disable_log_stats": True}) == {
        "tensor_parallel_size": 2, "disable_log_stats": True,
    }  # fmt: skip


def test_a_server_sees_the_devices_of_all_ranks_of_its_replica(monkeypatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert server_environment(["2", "GPU-1a"], 2) == {"CUDA_VISIBLE_DEVICES": "2,GPU-1a"}
    assert server_environment([], 1) == {}
    assert server_environment([], 2) == {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1|2-3")
    assert server_environment([], 2) == {}
