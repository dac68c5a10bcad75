"""What does a person see of a running job?"""

import io

from chatlearn_vllm.observability.progress import EpisodeProgress


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self):
        return True


def test_without_a_terminal_each_episode_is_a_plain_line():
    stream = io.StringIO()
    with EpisodeProgress(total=2, stream=stream) as progress:
        progress.update(1, {"rollout/reward_mean": 0.5, "train/loss": 0.25})
        progress.update(2, {"rollout/reward_mean": 0.75, "not/shown": 1.0})

    assert stream.getvalue().splitlines() == [
        "episode 1/2  reward 0.5  loss 0.25",
        "episode 2/2  reward 0.75",
    ]


def test_on_a_terminal_there_is_a_bar_with_the_newest_numbers():
    stream = Terminal()
    with EpisodeProgress(total=2, stream=stream) as progress:
        progress.update(2, {"rollout/reward_mean": 0.75})

    assert "2/2" in stream.getvalue()
    assert "reward 0.75" in stream.getvalue()
