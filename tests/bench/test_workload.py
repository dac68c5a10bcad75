"""Which prompts does each pass get, and which of them has no pass had before?"""

import json

import pytest

from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.workload import (
    has_weights,
    latency_prompts,
    made_config,
    num_prompts_needed,
    prompts_of_pass,
)


@pytest.fixture
def model(tmp_path):
    """A directory with the config.json of a model of 512 tokens."""
    (tmp_path / "config.json").write_text(json.dumps(made_config("tiny", 64)))
    return tmp_path


def test_more_requests_for_latencies_than_prompts_per_pass_have_prompts_of_their_own(model):
    options = BenchOptions.of({"prompts": 3, "latency_requests": 8, "repeat": 2, "warmup": 1})
    alone, together = latency_prompts(options, model)
    assert (len(alone), len(together)) == (8, 3)
    earlier = [one for number in range(3) for one in prompts_of_pass(options, model, number)]
    all_of_them = [tuple(one.token_ids) for one in (*earlier, *together, *alone)]
    assert len(set(all_of_them)) == len(all_of_them) == num_prompts_needed(options)


def test_what_a_trainer_leaves_behind_is_no_weights(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    assert not has_weights(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert has_weights(tmp_path)
