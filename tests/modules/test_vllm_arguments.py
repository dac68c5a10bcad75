"""Which engine arguments does a policy get that its yaml does not name?"""

import json

import pytest

from chatlearn_vllm.engines.vllm_arguments import engine_arguments
from chatlearn_vllm.layouts import ModelShape
from tests.helpers.engines import policy_job
from tests.helpers.tiny_llama import save_tiny_llama

NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


def arguments(model_dir, job_dir, on_gpu, **model_args):
    args = policy_job(job_dir, model_dir, **model_args).models["policy"].model_args
    shape = ModelShape.from_hf_config(json.loads((model_dir / "config.json").read_text()))
    return engine_arguments(args, model_dir, shape, seed=1, on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("given", "largest"),
    [
        ({"max_num_seqs": 512}, None),
        ({"max_num_seqs": 600}, 608),
        ({"max_num_seqs": 1024}, 1024),
        ({"max_num_seqs": 4096}, 1024),
        ({"max_num_seqs": 1024, "enforce_eager": True}, None),
        ({"max_num_seqs": 1024, "speculative_config": NGRAM}, None),
        ({"max_num_seqs": 1024, "max_cudagraph_capture_size": 256}, 256),
        ({"max_num_seqs": 1024, "cudagraph_capture_sizes": [1, 2]}, None),
        ({"max_num_seqs": 1024, "compilation_config": {"level": 0}}, None),
    ],
    ids=str,
)
def test_steps_of_many_sequences_have_cuda_graphs_unless_the_yaml_says_otherwise(
    model_dir, tmp_path, given, largest
) -> None:
    found, _ = arguments(model_dir, tmp_path, on_gpu=True, **given)
    assert found.get("max_cudagraph_capture_size") == largest


@pytest.mark.parametrize(
    ("seq_length", "of_config", "longest"),
    [
        (100, {}, 112),
        (254, {}, 256),  # the model has 256 positions
        (256, {}, 256),
        (100, {"rope_scaling": {"original_max_position_embeddings": 100}}, 100),
        (100, {"rope_scaling": {"original_max_position_embeddings": 50}}, 112),
        (254, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 266),
        (100, {"max_sequence_length": 102}, 102),  # vLLM takes the least of them
        (254, {"model_max_length": 300}, 266),
        (100, {"max_position_embeddings": None}, 100),
    ],
)  # fmt: skip
def test_behind_the_longest_sequence_there_is_room_for_drafts(
    tmp_path, seq_length, of_config, longest
) -> None:
    model_dir = tmp_path / "model"
    save_tiny_llama(model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | of_config))
    keys = {"seq_length": seq_length, "speculative_config": NGRAM}
    assert arguments(model_dir, tmp_path, on_gpu=True, **keys)[0]["max_model_len"] == longest
    plain, _ = arguments(model_dir, tmp_path, on_gpu=True, seq_length=seq_length)
    assert plain["max_model_len"] == seq_length


@pytest.mark.parametrize(
    ("given", "longest"),
    [
        ({"hf_overrides": {"max_position_embeddings": 100}}, 100),
        ({"disable_sliding_window": True}, 100),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 104}, 104),
        ({"enable_chunked_prefill": True, "max_num_batched_tokens": 104}, 112),
        ({"max_model_len": 120}, 120),
    ],
    ids=str,
)
def test_that_room_is_not_more_than_vllm_takes(model_dir, tmp_path, given, longest) -> None:
    keys = {"seq_length": 100, "max_num_seqs": 8, "speculative_config": NGRAM, **given}
    assert arguments(model_dir, tmp_path, on_gpu=True, **keys)[0]["max_model_len"] == longest


def test_on_cpu_a_step_takes_whole_prompts(model_dir, tmp_path) -> None:
    args = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "enable_chunked_prefill": True}
    found, notices = arguments(model_dir, tmp_path, on_gpu=False, **args)
    assert found["enable_chunked_prefill"] is False
    assert found["max_num_batched_tokens"] == found["max_model_len"]
    assert any(notice.startswith("enable_chunked_prefill: off") for notice in notices)
    assert any(notice.startswith("max_num_batched_tokens: 16 becomes") for notice in notices)
    found, _ = arguments(model_dir, tmp_path, on_gpu=True, **args)
    assert found["enable_chunked_prefill"] and found["max_num_batched_tokens"] == 16
