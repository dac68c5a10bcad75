"""Does what depends on the version of vLLM follow the one that is installed?"""

import os
import re

import pytest
from packaging.version import Version

from chatlearn_vllm.engines import vllm_compat
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.engines import policy_job, put_weights, start_policy
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
        vllm_compat.set_environment(draft_method=method, older_model_runner=older)
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


def test_servers_schedule_stages_ahead_where_their_vllm_knows_when_it_can(install) -> None:
    install("0.25.1")
    assert vllm_compat.server_overrides(pipeline_parallel_size=2) == {"async_scheduling": False}
    assert vllm_compat.server_overrides(pipeline_parallel_size=1) == {}
    install("0.32.0")
    assert vllm_compat.server_overrides(pipeline_parallel_size=2) == {}


def letters(text: str) -> list[int]:
    """Token ids of a tokenizer with one token per letter."""
    return [ord(letter) for letter in text]


def words(number: int, length: int = 1) -> list[str]:
    return [chr(200 + place) * length for place in range(number)]


@pytest.mark.parametrize(
    ("fits", "too_much"),
    [
        ({"allowed_token_ids": [*range(1024)]}, {"allowed_token_ids": [*range(1025)]}),
        ({"logit_bias": dict.fromkeys(range(1024), 1.0)},
         {"logit_bias": dict.fromkeys(range(1025), 1.0)}),
        # Each word counts twice: alone and behind a space, which is a token more here.
        ({"bad_words": [*words(64), *words(64)]}, {"bad_words": words(65)}),
        ({"bad_words": words(60, 8)}, {"bad_words": words(61, 8)}),
        ({"stop_token_ids": [*range(200)]}, {"stop_token_ids": [*range(200)], "min_tokens": 2}),
        ({"bad_words": None, "min_tokens": 2, "stop_token_ids": [2]},
         {"thinking_token_budget": 8}),
    ],
)  # fmt: skip
def test_requests_that_the_newer_model_runner_refuses_get_the_older(
    install, runner, fits, too_much
) -> None:
    install("0.25.1")
    assert vllm_compat.why_older_model_runner(fits, letters) is None
    (key,) = {*too_much} - {"min_tokens"}
    assert vllm_compat.why_older_model_runner(too_much, letters) == key
    assert runner(older=True) == "0"
    assert runner("1", older=True) == "1"  # who asks for it gets it


def test_newer_versions_are_told_to_take_so_many_bad_words(install, monkeypatch) -> None:
    install("0.32.0")
    limits = ("VLLM_MAX_NUM_BAD_WORDS", "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS")
    for name, value in zip(limits, ("", "2000"), strict=True):
        monkeypatch.setenv(name, value)  # what is set below is undone
    monkeypatch.delenv(limits[0])

    def found(number, length):
        request = {"bad_words": words(number, length)}
        vllm_compat.allow_bad_words(request, letters)
        assert vllm_compat.why_older_model_runner(request, letters) is None
        return [os.environ.get(name) for name in limits]

    assert found(64, 8) == [None, "2000"]
    assert found(65, 8) == ["130", "2000"]
    assert found(60, 20) == ["130", str(60 * 41)]


def rollout_with_many_bad_words(directory):
    """On a rank: what a policy says that is forbidden more words than vLLM takes by default."""
    model_dir = directory / "model"
    model_dir.mkdir()
    model = save_tiny_llama(model_dir)
    alphabet = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pairs = [first + last for first in alphabet for last in alphabet]
    job = policy_job(directory, model_dir, bad_words=pairs, n=4, max_new_tokens=40)
    module = start_policy(VLLMPolicyInference, job)
    module.build_prompts(["a", "12+34="])
    put_weights(module, model, version=1)
    batch = module.generate([0, 1], first_sample=0)
    module.shutdown()
    return os.environ.get(RUNNER), batch["str_outputs"]


def test_more_bad_words_than_vllm_takes_by_default_are_forbidden(tmp_path) -> None:
    ranks = Ranks(1)
    try:
        ((asked_for, texts),) = ranks.run(rollout_with_many_bad_words, tmp_path)
    finally:
        ranks.close()
    is_old = vllm_compat.installed_version() < Version("0.32")
    assert asked_for == ("0" if is_old else None)
    assert len(texts) == 8
    assert any(re.search("[a-z]", text) for text in texts)
    assert not any(re.search("[a-z]{2}", text) for text in texts)
