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
    ("seq_length", "of_files", "longest"),
    [
        (100, {}, 108),
        (254, {}, 256),  # the model has 256 positions
        (256, {}, 256),
        (100, {"tokenizer_config.json": {"model_max_length": 103}}, 103),
        (100, {"tokenizer_config.json": {"model_max_length": 1e30}}, 108),
        (100, {"config.json": {"rope_scaling": {"original_max_position_embeddings": 100}}}, 100),
        (100, {"config.json": {"rope_scaling": {"original_max_position_embeddings": 50}}}, 108),
    ],
)  # fmt: skip
def test_behind_the_longest_sequence_there_is_room_for_drafts(
    tmp_path, seq_length, of_files, longest
) -> None:
    model_dir = tmp_path / "model"
    save_tiny_llama(model_dir)
    for name, changes in of_files.items():
        content = json.loads((model_dir / name).read_text())
        (model_dir / name).write_text(json.dumps(content | changes))
    keys = {"seq_length": seq_length, "speculative_config": NGRAM}
    assert arguments(model_dir, tmp_path, on_gpu=True, **keys)[0]["max_model_len"] == longest
    plain, _ = arguments(model_dir, tmp_path, on_gpu=True, seq_length=seq_length)
    assert plain["max_model_len"] == seq_length


def test_on_cpu_a_step_takes_whole_prompts(model_dir, tmp_path) -> None:
    args = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "enable_chunked_prefill": True}
    found, notices = arguments(model_dir, tmp_path, on_gpu=False, **args)
    assert found["enable_chunked_prefill"] is False
    assert found["max_num_batched_tokens"] == found["max_model_len"]
    assert any(notice.startswith("enable_chunked_prefill: off") for notice in notices)
    assert any(notice.startswith("max_num_batched_tokens: 16 becomes") for notice in notices)
    found, _ = arguments(model_dir, tmp_path, on_gpu=True, **args)
    assert found["enable_chunked_prefill"] and found["max_num_batched_tokens"] == 16
