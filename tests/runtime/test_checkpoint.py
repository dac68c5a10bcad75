"""From which episode does an interrupted job go on?"""

import pytest

from chatlearn_vllm.runtime.checkpoint import DriverState, load_state, save_state


def test_the_newest_complete_state_is_loaded(tmp_path):
    for episode in (9, 10):
        save_state(tmp_path, DriverState(episode, episode + 1, {"epoch": 0, "position": episode}))
    (tmp_path / "episode_00000011.tmp").write_text('{"episode": 1')  # killed while writing

    assert load_state(tmp_path) == DriverState(10, 11, {"epoch": 0, "position": 10})
    assert load_state(tmp_path, episode=9).weight_version == 10


def test_only_the_newest_states_are_kept(tmp_path):
    for episode in (1, 2, 3):
        save_state(tmp_path, DriverState(episode, episode, {}), keep=2)

    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "episode_00000002.json",
        "episode_00000003.json",
    ]


def test_without_a_state_the_job_starts_at_the_beginning(tmp_path):
    assert load_state(tmp_path / "missing") is None


def test_a_state_that_is_asked_for_must_exist(tmp_path):
    with pytest.raises(ValueError, match="load_data_checkpoint_iteration=7"):
        load_state(tmp_path, episode=7)
