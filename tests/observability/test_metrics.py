"""What is in the metrics file after a run, a resume, a kill?"""

import json
import os
import signal
import subprocess
import sys

import pytest

from chatlearn_vllm.observability.metrics import MetricWriter, read_metrics

ENDLESS_WRITER = """
import sys
from chatlearn_vllm.observability.metrics import MetricWriter
with MetricWriter(sys.argv[1], first_episode=1, tensorboard=False) as writer:
    for episode in range(1, 10**9):
        writer.write(episode, {"rollout/reward_mean": 0.25, "padding": "x" * 5000})
        print(episode, flush=True)
"""


def test_each_episode_is_one_json_line(tmp_path):
    with MetricWriter(tmp_path, first_episode=1, tensorboard=False) as writer:
        writer.write(1, {"train/loss": 0.5})
        writer.write(2, {"train/loss": 0.25})
        lines = writer.path.read_text().splitlines()  # readable while the job runs

    assert [json.loads(line) for line in lines] == [
        {"episode": 1, "train/loss": 0.5},
        {"episode": 2, "train/loss": 0.25},
    ]


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(20):
        last_reported = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    episodes = [line["episode"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert episodes == list(range(1, len(episodes) + 1))
    assert len(episodes) >= last_reported


def test_a_resumed_run_keeps_earlier_episodes_and_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"episode": 1}\n{"episode": 2}\n{"episode": 3}\n{"episode": 4, "train/lo')

    with MetricWriter(tmp_path, first_episode=3, tensorboard=False) as writer:
        writer.write(3, {"train/loss": 0.5})

    assert read_metrics(path) == [
        {"episode": 1},
        {"episode": 2},
        {"episode": 3, "train/loss": 0.5},
    ]


def test_a_new_run_in_the_same_directory_starts_a_new_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"episode": 0}\n{"episode": 1}\n')

    MetricWriter(tmp_path, first_episode=0, tensorboard=False).close()

    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricWriter(tmp_path, first_episode=1) as writer:
        writer.write(1, {"rollout/reward_mean": 0.25})
        writer.write(2, {"rollout/reward_mean": 0.5})

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("rollout/reward_mean")]
    assert found == [(1, pytest.approx(0.25)), (2, pytest.approx(0.5))]
