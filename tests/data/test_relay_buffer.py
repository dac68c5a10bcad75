"""Which episodes are kept for training, and what is left of them after a resume?"""

import pytest
import torch

from chatlearn_vllm.data.relay_buffer import RelayBuffer, all_samples, num_episodes_kept


def batch_of(episode):
    return {"rewards": torch.tensor([10.0 * episode, 10.0 * episode + 1]), "text": ["a", "b"]}


@pytest.mark.parametrize(
    ("max_episodes", "first_episode", "kept"),
    [
        (0, 0, [[1], [2], [3], [4]]),
        (1, 0, [[1], [2], [3], [4]]),
        (2, 0, [[1], [1, 2], [2, 3], [3, 4]]),
        (4, 0, [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]),
        (-1, 0, [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]),
        (3, 2, [[1], [2], [2, 3], [2, 3, 4]]),
        (-1, 3, [[1], [2], [3], [3, 4]]),
    ],
)
def test_the_last_episodes_are_kept_also_over_a_resume(max_episodes, first_episode, kept):
    steady, handed_back = RelayBuffer(max_episodes, first_episode), []
    relay = RelayBuffer(max_episodes, first_episode)
    for episode, expected in enumerate(kept, start=1):
        handed_back.append(steady.add(episode, batch_of(episode)))
        buffers = relay.add(episode, batch_of(episode))
        assert [one.episode for one in buffers] == expected
        assert num_episodes_kept(episode, max_episodes, first_episode) == len(expected)
        state = relay.state_dict()
        relay = RelayBuffer(max_episodes, first_episode)
        relay.load_state_dict(state)
    # what was handed back stays as it was in its episode
    assert [[one.episode for one in buffers] for buffers in handed_back] == kept


def test_a_checkpoint_holds_only_what_the_next_episode_trains_on():
    for max_episodes, num_saved in ((0, 0), (1, 0), (3, 2), (-1, 4)):
        relay = RelayBuffer(max_episodes)
        for episode in range(1, 5):
            relay.add(episode, batch_of(episode))
        assert len(relay.state_dict()) == num_saved


def test_all_samples_are_those_of_the_earliest_episode_first():
    relay = RelayBuffer(2)
    relay.add(1, batch_of(1))
    batch = all_samples(relay.add(2, batch_of(2)))
    assert batch["rewards"].tolist() == [10.0, 11.0, 20.0, 21.0]
    assert batch["text"] == ["a", "b", "a", "b"]
