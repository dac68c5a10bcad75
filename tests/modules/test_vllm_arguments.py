"""Which engine arguments does a policy get on a GPU that its yaml does not name?"""

import json

import pytest

from chatlearn_vllm.engines.vllm_arguments import engine_arguments
from chatlearn_vllm.layouts import ModelShape
from tests.helpers.engines import policy_job
from tests.helpers.tiny_llama import save_tiny_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


def arguments(model_dir, job_dir, **model_args):
    args = policy_job(job_dir, model_dir, **model_args).models["policy"].model_args
    shape = ModelShape.from_hf_config(json.loads((model_dir / "config.json").read_text()))
    return engine_arguments(args, model_dir, shape, seed=1, on_gpu=True)[0]


@pytest.mark.parametrize(
    ("given", "largest"),
    [
        ({"max_num_seqs": 512}, None),
        ({"max_num_seqs": 600}, 608),
        ({"max_num_seqs": 1024}, 1024),
        ({"max_num_seqs": 4096}, 1024),
        ({"max_num_seqs": 1024, "enforce_eager": True}, None),
        ({"max_num_seqs": 1024, "max_cudagraph_capture_size": 256}, 256),
        ({"max_num_seqs": 1024, "cudagraph_capture_sizes": [1, 2]}, None),
        ({"max_num_seqs": 1024, "compilation_config": {"level": 0}}, None),
    ],
    ids=str,
)
def test_steps_of_many_sequences_have_cuda_graphs_unless_the_yaml_says_otherwise(
    model_dir, tmp_path, given, largest
) -> None:
    found = arguments(model_dir, tmp_path, **given)
    assert found.get("max_cudagraph_capture_size") == largest
