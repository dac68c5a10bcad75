"""What is said of a checkpoint to go on from, and of the models, before anything starts?"""

import json
import logging

import pytest

from chatlearn_vllm.config import UserError
from chatlearn_vllm.data.prompts import PromptSampler
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.runtime import base_engine, session
from chatlearn_vllm.runtime.checkpoint import DriverState, save_state
from chatlearn_vllm.runtime.evaluator import Evaluator
from chatlearn_vllm.runtime.grpo_engine import GRPOEngine
from tests.helpers.toy_modules import PROMPTS, ToyPolicy, ToyReward, ToyTrainer, write_job


class StartedError(Exception):
    pass


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A job of two episodes with a checkpoint after the second."""

    def start(*_):
        raise StartedError

    monkeypatch.setattr(base_engine, "Cluster", start)
    path = write_job(tmp_path)
    engine = make_engine(path)
    order = PromptSampler(len(PROMPTS), engine.args.seed).state_dict()
    state = DriverState(
        2, 2, order, {"num_samples": 64}, algorithm="GRPOEngine", num_records=len(PROMPTS)
    )
    save_state(engine.run_dir / "checkpoints" / "driver", state)
    return path


class OtherEngine(GRPOEngine):
    pass


def make_engine(path, *overrides, engine_class=GRPOEngine, records=PROMPTS):
    session.init(str(path), overrides)
    frozen = ToyPolicy("policy"), None, ToyReward("reward")
    engine = engine_class(*frozen, ToyTrainer("policy_trainer"))
    return engine if records is None else engine.set_dataset(records)


def test_a_job_that_is_finished_starts_nothing_and_says_so(path, caplog):
    assert make_engine(path).learn() == []
    assert "has the checkpoint of episode 2, and runtime.num_episode=2: nothing" in caplog.text


def test_another_experiment_with_the_same_directory_of_positions_starts_anew(path, tmp_path):
    positions = f"runtime.data_checkpoint_path={tmp_path / 'positions'}"
    engine = make_engine(path, positions)
    order = PromptSampler(len(PROMPTS), engine.args.seed).state_dict()
    state = DriverState(2, 2, order, {"num_samples": 64}, algorithm="GRPOEngine")
    save_state(tmp_path / "positions" / engine.args.exp_name, state)
    assert make_engine(path, positions).learn() == []
    with pytest.raises(StartedError):
        make_engine(path, positions, "runtime.exp_name=other").learn()


@pytest.mark.parametrize("key", ["output_dir", "data_checkpoint_path"])
def test_a_directory_that_cannot_be_written_is_told_before_anything_starts(path, tmp_path, key):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=rf"runtime.{key}: cannot write in .*file.*another directory"
    ):
        make_engine(path, f"runtime.{key}={tmp_path / 'file' / 'in'}").learn()


@pytest.mark.parametrize(
    "override",
    [
        "runtime.num_episode=3",
        "runtime.enable_resume_training=False",
        "runtime.load_data_checkpoint_iteration=1",  # is not there
    ],
)
def test_one_that_is_not_goes_on(path, override):
    with pytest.raises((StartedError, ValueError)):
        make_engine(path, override).learn()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.seed=7", "seed was 42 when it was saved and is 7 now"),
        ("runtime.data_shuffle=False", "shuffle was True when it was saved and is False now"),
    ],
)
def test_another_order_of_prompts_is_refused_before_anything_starts(path, override, message):
    with pytest.raises(ValueError, match=message):
        make_engine(path, "runtime.num_episode=3", override).learn()


def test_other_prompts_are_refused_before_anything_starts(path):
    with pytest.raises(ValueError, match="num_prompts was 16 when it was saved and is 15 now"):
        make_engine(path, "runtime.num_episode=3").set_dataset(PROMPTS[:15]).learn()


def test_training_data_ends_at_its_limit(path, tmp_path):
    lines = "".join(f"{json.dumps(prompt)}\n" for prompt in PROMPTS)
    (tmp_path / "train.jsonl").write_text(lines)
    data = [f"runtime.data_path={tmp_path / 'train.jsonl'}", "runtime.num_episode=3"]
    with pytest.raises(ValueError, match="num_prompts was 16 when it was saved and is 5 now"):
        make_engine(path, *data, "runtime.training_data_num_limit=5", records=None).learn()
    with pytest.raises(StartedError):
        make_engine(path, *data, records=None).learn()


def test_evaluations_take_the_first_prompts_of_their_file(path, tmp_path):
    lines = "".join(f"{json.dumps(prompt)}\n" for prompt in PROMPTS)
    (tmp_path / "eval.jsonl").write_text(lines)
    data = f"runtime.eval_data_path={tmp_path / 'eval.jsonl'}"
    for limit, count in ((3, 3), (-1, 16)):
        session.init(str(path), [data, f"runtime.eval_data_num_limit={limit}"])
        evaluator = Evaluator(ToyPolicy("policy"), ToyReward("reward"))
        assert evaluator.require_prompts() == PROMPTS[:count]


@pytest.mark.parametrize("num_records", [None, 20])
def test_prompts_that_only_the_policy_can_count_are_left_to_it(path, num_records):
    engine = make_engine(path, "runtime.num_episode=3").set_dataset(PROMPTS[:15])
    order = PromptSampler(len(PROMPTS), engine.args.seed).state_dict()
    state = DriverState(2, 2, order, algorithm="GRPOEngine", num_records=num_records)
    save_state(engine.run_dir / "checkpoints" / "driver", state)
    with pytest.raises(StartedError):
        engine.learn()


def test_a_reward_that_cannot_score_is_told_before_anything_starts(path):
    engine = make_engine(path, "runtime.num_episode=3")
    engine.rewards = (BaseModule("reward"),)
    with pytest.raises(
        UserError, match=r"models.reward: BaseModule has no forward_step\(self, data"
    ):
        engine.learn()


def test_models_of_the_yaml_that_are_not_started_are_told(path, caplog):
    with pytest.raises(StartedError):
        make_engine(path, "runtime.num_episode=3").learn()
    assert "not started, as this GRPOEngine has no use for it: models.reference" in caplog.text


def test_a_checkpoint_of_another_algorithm_is_told(path, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(StartedError):
        make_engine(path, "runtime.num_episode=3").learn()
    assert "what GRPOEngine has trained" not in caplog.text
    with pytest.raises(StartedError):
        make_engine(path, "runtime.num_episode=3", engine_class=OtherEngine).learn()
    assert "resuming with OtherEngine what GRPOEngine has trained in" in caplog.text
