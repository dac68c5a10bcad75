"""From which episode does an interrupted job go on?"""

import json
from fractions import Fraction

import pytest
import torch

from chatlearn_vllm.engines.megatron import checkpoint_files
from chatlearn_vllm.runtime.checkpoint import (
    DriverState,
    check_trainers,
    load_state,
    remove_states,
    save_state,
    saved_episodes,
)


def test_the_newest_complete_state_is_loaded(tmp_path):
    for episode in (9, 10):
        save_state(tmp_path, DriverState(episode, episode + 1, {"epoch": 0, "position": episode}))
    (tmp_path / "episode_00000011.tmp").write_text('{"episode": 1')  # killed while writing

    assert load_state(tmp_path) == DriverState(10, 11, {"epoch": 0, "position": 10})
    assert load_state(tmp_path, episode=9).weight_version == 10


def test_a_state_is_put_in_place_of_another_and_not_written_over_it(tmp_path):
    directory = tmp_path / "of a job" / "driver"
    save_state(directory, DriverState(1, 1, {}, batches=[torch.zeros(2)]))
    for name in ("episode_00000001.json", "episode_00000001.pt"):
        (tmp_path / name).hardlink_to(directory / name)  # what a reader has opened
    save_state(directory, DriverState(1, 2, {}, batches=[torch.ones(2)]))

    opened, replaced = load_state(tmp_path), load_state(directory)
    assert (opened.weight_version, opened.batches[0].tolist()) == (1, [0.0, 0.0])
    assert (replaced.weight_version, replaced.batches[0].tolist()) == (2, [1.0, 1.0])


def test_only_the_newest_states_are_kept(tmp_path):
    for episode in (1, 2, 3):
        save_state(tmp_path, DriverState(episode, episode, {}), keep=2)

    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "episode_00000002.json",
        "episode_00000003.json",
    ]


def test_states_that_are_not_there_need_not_be_removed(tmp_path):
    for episode in (1, 2):
        save_state(tmp_path, DriverState(episode, episode, {}))
    remove_states(tmp_path, [7, 1])
    assert saved_episodes(tmp_path) == [2]


def test_states_of_an_earlier_run_that_went_further_take_no_place(tmp_path):
    for episode in range(1, 11):
        save_state(tmp_path, DriverState(episode, episode, {}))
    save_state(tmp_path, DriverState(3, 3, {}), keep=2)
    assert saved_episodes(tmp_path) == [2, 3, *range(4, 11)]


def test_without_a_state_the_job_starts_at_the_beginning(tmp_path):
    assert load_state(tmp_path / "missing") is None


def test_a_state_that_is_asked_for_must_exist(tmp_path):
    save_state(tmp_path, DriverState(3, 3, {}))

    with pytest.raises(ValueError, match="load_data_checkpoint_iteration=7: .* it has 3"):
        load_state(tmp_path, episode=7)


def test_a_broken_state_is_named_with_what_can_be_loaded_instead(tmp_path):
    for episode in (2, 4):
        save_state(tmp_path, DriverState(episode, episode, {}))
    (tmp_path / "episode_00000004.json").write_text('{"episode": 4')

    with pytest.raises(ValueError, match="episode_00000004.json: is not JSON .*: 2 goes on"):
        load_state(tmp_path)


def test_what_is_no_state_is_named_or_not_looked_at(tmp_path):
    save_state(tmp_path, DriverState(2, 2, {}))
    (tmp_path / "episode_00000002 (copy).json").write_text("{}")  # a user's
    assert load_state(tmp_path).episode == 2

    for text in ("[]", "null", '{"episode": 3, "what": 1}'):
        (tmp_path / "episode_00000003.json").write_text(text)
        with pytest.raises(ValueError, match="episode_00000003.json: is no state of a job .*: 2"):
            load_state(tmp_path)


def test_a_checkpoint_counts_only_if_the_files_of_all_trainers_are_whole(tmp_path):
    policy, value = tmp_path / "policy", tmp_path / "value"
    for episode in (1, 2, 3):
        save_state(tmp_path / "driver", DriverState(episode, episode, {}))
        for trainer in (policy, value):
            write_checkpoint(trainer, episode)
    elsewhere = tmp_path / "on other hosts"
    check_trainers(tmp_path / "driver", 3, [policy, value, elsewhere])

    (policy / "iter_0000003" / "weights").unlink()
    (value / "iter_0000002" / "weights").write_text("123")

    with pytest.raises(ValueError) as error:
        check_trainers(tmp_path / "driver", 3, [policy, value, elsewhere])
    assert f"{policy / 'iter_0000003'}: weights is missing" in str(error.value)
    assert "Complete: 1; runtime.load_data_checkpoint_iteration: 1 goes on" in str(error.value)


def test_old_checkpoints_go_but_those_that_are_protected_or_later(tmp_path):
    for iteration in (1, 2, 3, 4, 9):
        write_checkpoint(tmp_path, iteration)
    (tmp_path / ".iter_0000001.removed").mkdir()  # a kill while removing
    (tmp_path / "hf").mkdir()  # a user's

    assert checkpoint_files.prune(tmp_path, keep=2, newest=4, protected=[1]) == [2]

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hf", "iter_0000001", "iter_0000003", "iter_0000004", "iter_0000009",
    ]  # fmt: skip


def write_checkpoint(directory, iteration):
    """A file, and the marker that says how it was written."""
    path = directory / checkpoint_files.checkpoint_name(iteration)
    path.mkdir(parents=True)
    (path / "weights").write_text("1234")
    files = checkpoint_files.describe_files(path)
    (path / checkpoint_files.MARKER).write_text(json.dumps({"files": files}))


def test_batches_are_saved_beside_the_state_and_go_with_it(tmp_path):
    batches = [{"episode": 1, "batch": {"rewards": torch.tensor([0.5]), "text": ["a"]}}]
    save_state(tmp_path, DriverState(1, 1, {}, batches=batches))
    save_state(tmp_path, DriverState(2, 2, {}))
    assert load_state(tmp_path, episode=1).batches == batches
    assert load_state(tmp_path).batches is None

    save_state(tmp_path, DriverState(3, 3, {}, batches=batches), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "episode_00000003.json",
        "episode_00000003.pt",
    ]


def test_broken_batches_are_named_with_what_can_be_loaded_instead(tmp_path):
    for episode in (1, 2):
        save_state(tmp_path, DriverState(episode, episode, {}, batches=[torch.zeros(4)]))
    path = tmp_path / "episode_00000002.pt"
    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(ValueError, match="episode_00000002.pt: cannot be read .*: 1 goes on"):
        load_state(tmp_path)
    torch.save([Fraction(1, 2)], path)  # an object that tensors do not need, and could run code
    with pytest.raises(ValueError, match="(?s)episode_00000002.pt: cannot be read .*Fraction"):
        load_state(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="episode_00000002.pt: cannot be read"):
        load_state(tmp_path)
