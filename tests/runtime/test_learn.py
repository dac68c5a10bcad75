"""Does a whole job, with toy models on real Ray, do the right things in the right order?"""

import json
import socket

import pytest
import ray

from chatlearn_vllm.observability.metrics import read_metrics
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.evaluator import Evaluator
from chatlearn_vllm.runtime.grpo_engine import GRPOEngine
from chatlearn_vllm.runtime.sft_engine import SFTEngine
from tests.helpers.toy_modules import (
    PROMPTS,
    ToyPolicy,
    ToyReference,
    ToyReward,
    ToyTrainer,
    calls_of,
    write_job,
)
from tests.runtime.conftest import left_after, rank_processes


def make_engine(path, *overrides, trainer=ToyTrainer, reward=ToyReward):
    """The toy job's engine, with data and evaluator."""
    session.init(str(path), overrides)
    policy, score = ToyPolicy("policy"), reward("reward")
    engine = GRPOEngine(policy, ToyReference("reference"), score, trainer("policy_trainer"))
    engine.set_dataset(PROMPTS)
    engine.set_evaluator(Evaluator(policy, score, PROMPTS))
    return engine


def test_an_episode_does_its_steps_in_order_and_models_take_turns_in_memory(
    existing_cluster, tmp_path
):
    engine = make_engine(write_job(tmp_path, num_episode=2, kl=0.1))

    history = engine.learn()

    noted = [
        line
        for line in (engine.run_dir / "calls.txt").read_text().splitlines()
        if line.split()[1:3] == ["0", "0"]
    ]
    turns = [" ".join((line.split()[0], *line.split()[3:])) for line in noted]
    # The reward is always in memory: it scores each replica's samples when they come.
    while_others_work = [turn for turn in turns if turn == "reward forward_step 16"]
    turns = [turn for turn in turns if turn != "reward forward_step 16"]
    set_up = turns.index("policy_trainer onload weights")
    assert turns[:set_up] == [
        "policy_trainer model_setup",
        "policy_trainer offload weights grads optimizer",
        "reference model_setup",
        "reference offload",
        "reward model_setup",
        "policy model_setup",
        "policy sleep",
    ]
    first_sync = [
        "policy_trainer onload weights",
        "policy_trainer offload grads optimizer",
        "policy wake_weights",
        "policy_trainer export_weights",
        "policy import_weights",
        "policy finish_weight_sync 1",
        "policy_trainer offload weights",
        "policy wake_kv_cache",
    ]
    evaluation = ["policy generate eval 0"]
    assert turns[set_up:][:9] == first_sync + evaluation
    episode = [
        "policy generate train {first}",
        "policy sleep",
        "reference onload",
        "reference forward_step",
        "reference offload",
        "policy_trainer onload weights grads optimizer",
        "policy_trainer train 16",
        "policy_trainer offload grads optimizer",
        "policy wake_weights",
        "policy_trainer export_weights",
        "policy import_weights",
        "policy finish_weight_sync {version}",
        "policy_trainer offload weights",
        "policy wake_kv_cache",
    ]
    expected = [step.format(first=0, version=2) for step in episode]
    expected += [step.format(first=32, version=3) for step in episode]
    assert turns[set_up + 9 :] == [
        *expected,
        *evaluation,
        *(f"{name} shutdown" for name in ("policy_trainer", "reference", "reward", "policy")),
    ]
    assert len(while_others_work) == 2 + 2 * 2  # evaluations, and episodes of two replicas
    assert read_metrics(engine.run_dir / "metrics.jsonl") == history
    # The cluster was there before; it goes on without any rank of this job.
    assert not ray.is_initialized()
    assert left_after(30, rank_processes, existing_cluster) == {}
    host, port = existing_cluster.split(":")
    socket.create_connection((host, int(port)), timeout=5).close()


def test_the_policy_gets_better_and_the_metrics_say_so(existing_cluster, tmp_path, capsys):
    engine = make_engine(write_job(tmp_path, num_episode=6, policy_tp=2), "runtime.log_interval=4")

    before, *episodes = engine.learn()

    assert before["episode"] == 0
    assert [line["episode"] for line in episodes] == [1, 2, 3, 4, 5, 6]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("episode ")]
    assert [line.split()[1] for line in shown] == ["0/6", "4/6", "6/6"]
    assert episodes[-1]["eval/accuracy"] > before["eval/accuracy"] + 0.5
    last = episodes[-1]
    assert last["rollout/weight_version"] == 6 and last["sync/weight_version"] == 7
    assert last["rollout/response_tokens_mean"] == 6.0
    assert last["sync/bytes"] == 8 * 4  # one replica of eight float32 scores
    assert episodes[0]["train/logprob_abs_diff_mean"] < 0.2
    for name in ("rollout", "reward", "train", "sync", "eval", "episode"):
        assert last[f"time/{name}_s"] > 0
    assert "time/reference_s" not in last  # init_kl_coef is 0: no reference runs
    samples = [
        json.loads(line)
        for line in (engine.run_dir / "eval" / "episode_000006.jsonl").read_text().splitlines()
    ]
    assert [sample["answer"] for sample in samples] == list(range(16))
    assert {"str_prompts", "str_outputs", "rewards", "accuracy"} <= samples[0].keys()


def test_the_policy_gets_new_weights_as_often_as_the_yaml_says(existing_cluster, tmp_path):
    engine = make_engine(
        write_job(tmp_path, num_episode=3), "models.policy.sync_frequency=2",
        "models.policy.model_args.sleep_level=1", "runtime.validate_param_sync_stride=3",
    )  # fmt: skip

    _, *episodes = engine.learn()

    assert engine.weight_sync.stride == 3
    assert [line["rollout/weight_version"] for line in episodes] == [1, 1, 2]
    assert [line["sync/weight_version"] for line in episodes] == [1, 2, 2]
    calls = calls_of(engine.run_dir)
    assert calls.count("policy import_weights") == 2
    # Each episode it gives its memory back, and takes it again also where no weights come.
    assert calls.count("policy wake_weights") == calls.count("policy wake_kv_cache") == 4


def test_an_interrupted_job_goes_on_as_if_it_had_not_been(existing_cluster, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    overrides = [
        "models.policy.num_gpu=1",
        "models.policy_trainer.num_gpu=1",
        "runtime.save_episode_interval=1",
    ]
    whole = make_engine(write_job(tmp_path / "whole", num_episode=3), *overrides).learn()

    path = write_job(tmp_path / "parts", num_episode=3)
    make_engine(path, *overrides, "runtime.num_episode=2").learn()
    resumed = make_engine(path, *overrides)
    tail = resumed.learn()

    assert [line["episode"] for line in tail] == [3]
    for name in ("rollout/reward_mean", "rollout/weight_version", "train/loss"):
        assert tail[0][name] == whole[3][name]
    lines = read_metrics(resumed.run_dir / "metrics.jsonl")
    assert [line["episode"] for line in lines] == [0, 1, 2, 3]
    calls = calls_of(resumed.run_dir)  # the start is evaluated once: its samples stay
    assert calls.count("policy generate eval 0") == 2  # before training, and after episode 2


def test_fine_tuning_spreads_records_over_the_data_parallel_ranks(existing_cluster, tmp_path):
    path = write_job(tmp_path, num_episode=1)
    session.init(str(path), ["runtime.data_shuffle=False", "runtime.save_episode_interval=5"])
    engine = SFTEngine(ToyTrainer("policy_trainer"))
    engine.set_dataset([{"prompt": str(row), "response": "r"} for row in range(32)])

    history = engine.learn()

    assert history[0]["train/loss"] == 1.0
    noted = (engine.run_dir / "calls.txt").read_text().splitlines()
    records = {line.split()[2]: line.split()[4] for line in noted if "train_records" in line}
    rows_of_rank = [list(map(int, records[rank].split(","))) for rank in ("0", "1")]
    for step in (0, 1):  # 16 records each, 8 on each rank, about as long on both
        rows = [rows[8 * step : 8 * step + 8] for rows in rows_of_rank]
        assert sorted(rows[0] + rows[1]) == [*range(16 * step, 16 * step + 16)]
        digits = [len("".join(map(str, part))) for part in rows]
        assert abs(digits[0] - digits[1]) <= 1
    assert "save_checkpoint 1" in noted[-3]  # the last episode is saved whatever the interval


def test_relative_paths_are_the_drivers_also_with_a_working_dir(
    existing_cluster, tmp_path, monkeypatch
):
    path = write_job(tmp_path, num_episode=1)
    (tmp_path / "uploaded").mkdir()
    monkeypatch.chdir(tmp_path)
    overrides = ["runtime_env.working_dir=uploaded", "runtime.output_dir=results"]
    session.init(str(path), [*overrides, "runtime.save_episode_interval=1"])
    engine = SFTEngine(ToyTrainer("policy_trainer"))
    engine.set_dataset([{"prompt": str(row), "response": "r"} for row in range(32)])
    engine.learn()
    assert engine.run_dir.parts[0] == "results"
    assert list((tmp_path / engine.run_dir).glob("policy_trainer_*.pt"))


def test_evaluations_that_nobody_makes_are_told(existing_cluster, tmp_path, caplog):
    keys = ["runtime.eval_episode_interval=1", "runtime.validate_param_sync=False"]
    session.init(str(write_job(tmp_path, num_episode=1)), keys)
    roles = ToyPolicy("policy"), None, ToyReward("reward")
    engine = GRPOEngine(*roles, ToyTrainer("policy_trainer")).set_dataset(PROMPTS)
    with caplog.at_level("WARNING"):
        engine.learn()
    assert "no effect of eval_episode_interval" in caplog.text
    assert engine.weight_sync.stride is None


@pytest.mark.parametrize(
    "key", ["dynamic_sampling=True", "max_relay_episode=2", "mismatch_stop.rollout_kl=0.1"]
)
def test_keys_of_rollouts_are_refused_where_nothing_is_generated(tmp_path, key):
    session.init(str(write_job(tmp_path)), [f"runtime.{key}"])
    with pytest.raises(ValueError, match=f"runtime.{key}: no effect in SFTEngine"):
        SFTEngine(ToyTrainer("policy_trainer"))


def test_keys_of_rollouts_in_a_models_entry_are_told_where_nothing_is_generated(tmp_path, caplog):
    caplog.set_level("INFO")
    session.init(str(write_job(tmp_path)), ["models.policy_trainer.sync_frequency=2"])
    SFTEngine(ToyTrainer("policy_trainer"))
    assert "policy_trainer: no effect of sync_frequency=2; it is of models that" in caplog.text


def test_a_kl_penalty_without_a_reference_is_refused(tmp_path):
    session.init(str(write_job(tmp_path, kl=0.1)))

    with pytest.raises(ValueError, match="init_kl_coef=0.1 needs a reference"):
        GRPOEngine(ToyPolicy("policy"), None, ToyReward("reward"), ToyTrainer("policy_trainer"))


def test_episodes_without_a_sync_need_a_sleep_that_keeps_the_weights(tmp_path):
    with pytest.raises(ValueError, match="set sleep_level: 1"):
        make_engine(write_job(tmp_path), "models.policy.sync_frequency=2")
