"""Do jobs run on GPUs: trainer and rollout on one GPU, and over two?"""

import pytest

from tests.gpu.conftest import LLAMA_100M
from tests.helpers.tiny_llama import save_tiny_llama
from tests.jobs.test_grpo_job import run, write_job

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory, **LLAMA_100M)
    return directory


def check(history) -> None:
    assert [metrics["sync/weight_version"] for metrics in history] == [1, 2, 3]
    for metrics in history[1:]:
        assert metrics["train/logprob_abs_diff_mean"] < 0.0176
        assert metrics["train/grad_norm"] > 0
        assert metrics["sync/bytes"] > 2 * 100e6


def test_trainer_reference_and_rollout_share_one_gpu(model_dir, tmp_path) -> None:
    job = write_job(
        tmp_path, model_dir,
        policy={"gpu_memory_utilization": 0.3}, trainer={"init_kl_coef": 0.05}, reference={},
        num_gpu=1, colocation=["policy,policy_trainer,reference"],
    )  # fmt: skip
    check(run(job))


@pytest.mark.parametrize(
    ("policy", "trainer"),
    [
        ({}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ({"tensor_model_parallel_size": 2}, {}),
        ({"tensor_model_parallel_size": 2, "enforce_eager": False}, {}),
        ({"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}),
    ],
    ids=["tp2 to two replicas", "dp2 to tp2", "dp2 to tp2 with graphs", "pp2 to pp2"],
)
def test_two_gpus_are_shared(two_gpus, model_dir, tmp_path, policy, trainer) -> None:
    job = write_job(
        tmp_path, model_dir,
        policy={"gpu_memory_utilization": 0.3, "enforce_eager": True, **policy}, trainer=trainer,
        colocation=["policy,policy_trainer"],
    )  # fmt: skip
    check(run(job))


def test_trainer_and_rollout_on_different_gpus(two_gpus, model_dir, tmp_path) -> None:
    job = write_job(
        tmp_path, model_dir,
        policy={"gpu_memory_utilization": 0.3, "enforce_eager": True}, trainer={}, num_gpu=1,
    )  # fmt: skip
    check(run(job))
