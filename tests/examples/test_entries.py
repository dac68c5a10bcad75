"""Do the scripts of the examples give their engines as much data as the yaml says?"""

import json
import runpy
import sys
from pathlib import Path

import pytest

from chatlearn_vllm.runtime.base_engine import BaseEngine
from chatlearn_vllm.runtime.eval_engine import EvalEngine

ROOT = Path(__file__).parents[2]
RECORDS = [{"prompt": f"{n}+0=", "response": f"{n}", "rejected": "?"} for n in range(5)]
LIMITS = ["runtime.training_data_num_limit=4", "runtime.eval_data_num_limit=3"]
LIMITS_OF_ROLES = [
    "actor_train.data_args.max_samples=4",
    "validation.data_args.max_samples=3",
]


@pytest.fixture
def engine_of(tmp_path, monkeypatch):
    """What a script runs with a shipped yaml, on files of these records; it does not start."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    for role in ("policy", "reward_trainer", "value", "sft", "reward"):
        monkeypatch.setenv(f"{role}_load", str(tmp_path))
    for kind in ("", "eval_", "sft_", "reward_", "reward_eval_"):
        monkeypatch.setenv(f"{kind}data_path", str(data))

    def run(script, yaml, overrides):
        engines = []
        monkeypatch.setattr(BaseEngine, "learn", lambda engine: engines.append(engine))
        monkeypatch.setattr(EvalEngine, "eval", lambda engine: engines.append(engine))
        path = str(ROOT / "examples/megatron/entry" / script)
        config = str(ROOT / "configs" / yaml)
        monkeypatch.setattr("sys.path", [*sys.path])
        monkeypatch.setattr("sys.argv", [path, "-c", config, *overrides])
        runpy.run_path(path, run_name="__main__")
        (engine,) = engines
        return engine

    return run


@pytest.mark.parametrize(
    ("script", "yaml", "overrides"),
    [
        ("train_grpo.py", "llama2/grpo.yaml", LIMITS),
        ("train_rlhf.py", "llama2/rlhf.yaml", LIMITS),
        ("train_online_dpo.py", "llama2/online_dpo.yaml", LIMITS),
        ("train_rlvr.py", "strategies/rlvr_config.yaml", LIMITS_OF_ROLES),
        ("train_sft.py", "llama2/sft.yaml", LIMITS),
        ("train_reward.py", "llama2/reward_training.yaml", LIMITS),
        ("eval.py", "llama2/eval.yaml", LIMITS),
    ],
)
def test_data_ends_at_its_limits(engine_of, script, yaml, overrides):
    engine = engine_of(script, yaml, overrides)
    if script != "eval.py":
        trained_on = [record["prompt"] for record in engine._training_records()]
        assert trained_on == ["0+0=", "1+0=", "2+0=", "3+0="]
    if script not in ("train_sft.py", "train_reward.py"):  # which reads it itself
        evaluated = [record["prompt"] for record in engine.evaluator.require_prompts()]
        assert evaluated == ["0+0=", "1+0=", "2+0="]
