"""Does a job that is asked to end save, and go on later as if nothing had happened?"""

import os
import signal
import threading

from chatlearn_vllm.observability.metrics import read_metrics
from chatlearn_vllm.runtime.stop_request import StopRequest
from tests.helpers.toy_modules import ToyReward, write_job
from tests.runtime.test_learn import make_engine

SETTINGS = [
    "models.policy.num_gpu=1",
    "models.policy_trainer.num_gpu=1",
    "runtime.save_episode_interval=10",  # not before the end
]


class TerminatingReward(ToyReward):
    """Sends SIGTERM to the driver in the second episode, once per job directory."""

    def forward_step(self, data, iteration=0):
        mark = self.runtime_args.run_dir / "driver.pid"
        if iteration == 2 and mark.exists():
            os.kill(int(mark.read_text()), signal.SIGTERM)
            mark.unlink()
        return super().forward_step(data, iteration)


def test_sigterm_saves_after_the_episode_and_the_job_goes_on_from_there(existing_cluster, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = make_engine(write_job(tmp_path / "whole", num_episode=4), *SETTINGS).learn()

    path = write_job(tmp_path / "parts", num_episode=4)
    engine = make_engine(path, *SETTINGS, reward=TerminatingReward)
    engine.run_dir.mkdir(parents=True)
    (engine.run_dir / "driver.pid").write_text(str(os.getpid()))
    head = engine.learn()

    assert [line["episode"] for line in head] == [0, 1, 2]
    resumed = make_engine(path, *SETTINGS)
    tail = resumed.learn()
    assert [line["episode"] for line in tail] == [3, 4]
    for episode in (3, 4):
        for name in ("rollout/reward_mean", "rollout/weight_version", "train/loss"):
            assert tail[episode - 3][name] == whole[episode][name], (episode, name)
    lines = read_metrics(resumed.run_dir / "metrics.jsonl")
    assert [line["episode"] for line in lines] == [0, 1, 2, 3, 4]


def test_a_second_sigterm_is_not_held_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("at once"))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_made and not seen
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == ["at once"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_nothing_is_changed():
    handlers = []

    def run():
        with StopRequest():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [before]
