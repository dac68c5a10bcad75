"""Does a job that is asked to end save, and go on later as if nothing had happened?"""

import os
import signal
import threading
import time

import pytest

from chatlearn_vllm.observability.metrics import read_metrics
from chatlearn_vllm.runtime.stop_request import AbandonedError, StopRequest
from tests.helpers.toy_modules import ToyReward, ToyTrainer, write_job
from tests.runtime.test_learn import make_engine

SETTINGS = [
    "models.policy.num_gpu=1",
    "models.policy_trainer.num_gpu=1",
    "runtime.save_episode_interval=10",  # not before the end
]


class Terminates:
    """Sends SIGTERM to the driver in the second episode, once per job directory."""

    def terminate(self, episode):
        mark = self.runtime_args.run_dir / "driver.pid"
        if episode == 2 and mark.exists():
            os.kill(int(mark.read_text()), signal.SIGTERM)
            mark.unlink()
            return True
        return False


class TerminatingReward(Terminates, ToyReward):
    """While samples are scored, for ever."""

    def forward_step(self, data, iteration=0):
        if self.terminate(iteration):
            time.sleep(60)
        return super().forward_step(data, iteration)


class TerminatingTrainer(Terminates, ToyTrainer):
    def train(self, data, iteration=0):
        self.terminate(iteration)
        return super().train(data, iteration)


@pytest.fixture(scope="module")
def whole(shared_cluster, tmp_path_factory):
    """Metrics of a job that nobody ends."""
    path = write_job(tmp_path_factory.mktemp("whole"), num_episode=4)
    return make_engine(path, *SETTINGS).learn()


@pytest.mark.parametrize(
    ("terminates", "finished"),
    [({"reward": TerminatingReward}, 1), ({"trainer": TerminatingTrainer}, 2)],
    ids=["leaves a rollout", "ends what is trained"],
)
def test_sigterm_saves_what_is_finished_and_the_job_goes_on_from_there(
    whole, existing_cluster, tmp_path, terminates, finished
):
    path = write_job(tmp_path, num_episode=4)
    engine = make_engine(path, *SETTINGS, **terminates)
    engine.run_dir.mkdir(parents=True)
    (engine.run_dir / "driver.pid").write_text(str(os.getpid()))
    head = engine.learn()

    assert [line["episode"] for line in head] == [*range(finished + 1)]
    resumed = make_engine(path, *SETTINGS)
    tail = resumed.learn()
    assert [line["episode"] for line in tail] == [*range(finished + 1, 5)]
    for line in tail:
        for name in ("rollout/reward_mean", "rollout/weight_version", "train/loss"):
            assert line[name] == whole[line["episode"]][name], (line["episode"], name)
    lines = read_metrics(resumed.run_dir / "metrics.jsonl")
    assert [line["episode"] for line in lines] == [0, 1, 2, 3, 4]


def test_what_can_be_done_again_is_not_waited_for():
    with StopRequest() as stop:
        with pytest.raises(AbandonedError), stop.abandons():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        with pytest.raises(AbandonedError), stop.abandons():
            raise AssertionError("the request was made before")


def test_an_interrupt_from_the_keyboard_stays_one():
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt), stop.abandons():
            raise KeyboardInterrupt
        assert not stop.is_made


def test_after_it_a_stop_is_noted_only():
    with StopRequest() as stop:
        with stop.abandons():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_made


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
