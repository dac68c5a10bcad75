"""Does what depends on the version of vLLM follow the one that is installed?"""

import os

import pytest

from chatlearn_vllm.engines import vllm_compat

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

    def prepared(drafts, asked=None):
        monkeypatch.setenv(RUNNER, asked or "")  # what is set below is undone
        if asked is None:
            monkeypatch.delenv(RUNNER)
        vllm_compat.set_environment(pipeline_parallel_size=1, drafts=drafts)
        return os.environ.get(RUNNER)

    return prepared


def test_a_vllm_outside_the_supported_range_is_refused_with_the_remedy(install) -> None:
    install("0.19.0")
    with pytest.raises(RuntimeError, match=r"vllm 0\.19\.0 is not supported.*pip install"):
        vllm_compat.installed_version()


def test_older_engines_draft_with_the_older_model_runner(install, runner) -> None:
    install("0.25.1")
    assert runner(drafts=True) == "0"
    assert runner(drafts=True, asked="false") == "0"
    assert runner(drafts=False) is None
    assert runner(drafts=False, asked="1") == "1"
    with pytest.raises(ValueError, match=f"{RUNNER}=1: with this model runner of vLLM 0.25.1"):
        runner(drafts=True, asked="1")


def test_newer_engines_draft_with_the_model_runner_of_their_choice(install, runner) -> None:
    install("0.32.0")
    assert runner(drafts=True) is None
    assert runner(drafts=True, asked="1") == "1"
