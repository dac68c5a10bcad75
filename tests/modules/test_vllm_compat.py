"""Does what depends on the version of vLLM follow the one that is installed?"""

import os

import pytest

from chatlearn_vllm.engines import vllm_compat
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.engines import policy_job, start_policy
from tests.helpers.ranks import Ranks
from tests.helpers.tiny_llama import save_tiny_llama

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lets another version of vLLM seem to be installed."""

    def install_version(version):
        metadata = tmp_path / f"vllm-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install_version


@pytest.fixture
def runner(monkeypatch):
    """Says which model runner the environment asks for after an engine was prepared."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # set again, and undone

    def prepared(asked=None, *, method=None, older=False):
        monkeypatch.setenv(RUNNER, asked or "")  # what is set below is undone
        if asked is None:
            monkeypatch.delenv(RUNNER)
        vllm_compat.set_environment(
            pipeline_parallel_size=1, draft_method=method, older_model_runner=older
        )
        return os.environ.get(RUNNER)

    return prepared


def test_a_vllm_outside_the_supported_range_is_refused_with_the_remedy(install) -> None:
    install("0.19.0")
    with pytest.raises(RuntimeError, match=r"vllm 0\.19\.0 is not supported.*pip install"):
        vllm_compat.installed_version()


def test_older_engines_draft_with_the_older_model_runner(install, runner) -> None:
    install("0.25.1")
    assert runner(method="eagle") == runner("false", method="eagle") == "0"
    assert runner() is None
    assert runner("1") == "1"
    with pytest.raises(ValueError, match=f"{RUNNER}=1: with this model runner of vLLM 0.25.1"):
        runner("1", method="eagle")
    with pytest.raises(ValueError, match="method='dspark' would draft with random weights in vLLM"):
        runner(method="dspark")


def test_newer_engines_draft_with_the_model_runner_of_their_choice(install, runner) -> None:
    install("0.32.0")
    assert runner(method="eagle") is None
    assert runner("1", method="eagle") == "1"
    assert runner(method="dspark") is None


@pytest.mark.parametrize(
    ("fits", "too_much"),
    [
        ({"allowed_token_ids": [*range(1024)]}, {"allowed_token_ids": [*range(1025)]}),
        ({"logit_bias": dict.fromkeys(range(1024), 1.0)},
         {"logit_bias": dict.fromkeys(range(1025), 1.0)}),
        ({"bad_words": ["a"] * 128}, {"bad_words": ["a"] * 129}),
        ({"stop_token_ids": [*range(200)]}, {"stop_token_ids": [*range(200)], "min_tokens": 2}),
        ({"bad_words": None, "min_tokens": 2, "stop_token_ids": [2]},
         {"thinking_token_budget": 8}),
    ],
)  # fmt: skip
def test_requests_that_the_newer_model_runner_refuses_get_the_older(
    install, runner, fits, too_much
) -> None:
    install("0.25.1")
    assert not vllm_compat.needs_older_model_runner(fits)
    assert vllm_compat.needs_older_model_runner(too_much)
    assert runner(older=True) == "0"
    assert runner("1", older=True) == "1"  # who asks for it gets it


def runner_of_a_policy(directory):
    """On a rank: the model runner of a policy with more bad words than the newer one takes."""
    model_dir = directory / "model"
    model_dir.mkdir()
    save_tiny_llama(model_dir)
    words = [
        chr(ord("a") + first) + chr(ord("a") + last) for first in range(12) for last in range(12)
    ]
    module = start_policy(VLLMPolicyInference, policy_job(directory, model_dir, bad_words=words))
    asked_for = os.environ.get(RUNNER)
    module.shutdown()
    return asked_for


def test_a_policy_s_requests_choose_its_model_runner(tmp_path) -> None:
    ranks = Ranks(1)
    try:
        assert ranks.run(runner_of_a_policy, tmp_path) == ["0"]
    finally:
        ranks.close()
