"""Which Ray does a job run on?"""

import pytest

from chatlearn_vllm.runtime.cluster import existing_cluster


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
