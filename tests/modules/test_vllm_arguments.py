"""How do keys of a yaml become arguments of engine and requests, and what is added to them?"""

import json
import shutil

import pytest
from packaging.version import Version
from vllm import SamplingParams

from chatlearn_vllm.engines import vllm_compat
from chatlearn_vllm.engines.vllm_arguments import (
    engine_arguments,
    max_response_tokens,
    sampling_arguments,
)
from chatlearn_vllm.layouts import ModelShape
from tests.helpers.documented_policy import VLLMPolicyInference
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


def test_keys_of_the_engine_reach_it(model_dir, tmp_path) -> None:
    keys = {
        "enable_prefix_caching": False, "quantization": "fp8", "enforce_eager": True,
        "gpu_memory_utilization": 0.35, "block_size": 32, "load_format": "safetensors",
    }  # fmt: skip
    found, _ = arguments(model_dir, tmp_path, on_gpu=True, **keys)
    assert {name: found[name] for name in keys} == keys
    assert found["disable_log_stats"]  # nobody reads them
    for reader in ({"log_metrics": True}, {"otlp_traces_endpoint": "http://localhost:4317"}):
        assert not arguments(model_dir, tmp_path, on_gpu=True, **reader)[0]["disable_log_stats"]


def test_draft_models_are_scheduled_ahead_by_both_versions(
    model_dir, tmp_path, monkeypatch
) -> None:
    def found(version, speculative_config, **model_args):
        monkeypatch.setattr(vllm_compat, "installed_version", lambda: Version(version))
        keys = {"speculative_config": speculative_config, **model_args}
        return arguments(model_dir, tmp_path, True, **keys)[0].get("async_scheduling")

    draft = {"method": "draft_model", "model": str(model_dir), "num_speculative_tokens": 2}
    assert found("0.25.1", draft) is True
    assert found("0.32.0", draft) is None  # it does so by itself
    assert found("0.25.1", draft, async_scheduling=False) is False
    assert found("0.25.1", draft | {"disable_padded_drafter_batch": True}) is None
    assert found("0.25.1", NGRAM) is None


def test_every_sampling_key_reaches_the_request(model_dir, tmp_path) -> None:
    training = {
        "temperature": 0.7, "top_p": 0.8, "top_k": 9, "min_p": 0.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "repetition_penalty": 1.1,
    }  # fmt: skip
    evaluation = {
        "temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.2, "presence_penalty": 0.4,
        "frequency_penalty": 0.5, "repetition_penalty": 1.2,
    }  # fmt: skip
    both = {"ignore_eos": True, "prompt_logprobs": 1, "skip_special_tokens": False, "min_tokens": 3}
    keys = training | {f"eval_{name}": value for name, value in evaluation.items()} | both
    job = policy_job(tmp_path, model_dir, n=4, stop_token_list="~;###", **keys)
    for is_eval, own in ((False, training), (True, evaluation)):
        sampling = sampling_arguments(job.models["policy"].model_args, is_eval=is_eval)
        made = SamplingParams(**sampling, max_tokens=5)
        expected = own | both | {"n": 1 if is_eval else 4, "stop": ["~", "###"], "logprobs": 0}
        assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(("limit", "of_a_short_prompt"), [(True, 12), (False, 86)])
def test_new_token_limit_says_whether_responses_end_before_the_sequence_does(
    model_dir, tmp_path, limit, of_a_short_prompt
) -> None:
    job = policy_job(tmp_path, model_dir, seq_length=96, max_new_tokens=12, new_token_limit=limit)
    args = job.models["policy"].model_args
    assert max_response_tokens(args, 10) == of_a_short_prompt
    assert max_response_tokens(args, 90) == 6


def test_the_tokenizer_may_be_of_another_directory(model_dir, tmp_path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text((model_dir / "config.json").read_text())
    keys = {"load": str(weights), "tokenizer": str(model_dir)}
    assert arguments(model_dir, tmp_path, on_gpu=True, **keys)[0]["tokenizer"] == str(model_dir)
    policy = VLLMPolicyInference("policy", policy_job(tmp_path, weights, **keys))
    assert policy.tokenizer.tokenizer.encode("a") == [68]


def test_code_of_a_tokenizer_runs_if_the_yaml_trusts_it(model_dir, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    directory = tmp_path / "own"
    shutil.copytree(model_dir, directory)
    path = directory / "tokenizer_config.json"
    own = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    base = "PreTrainedTokenizerFast"
    (directory / "own.py").write_text(
        f"from transformers import {base}\nclass OwnTokenizer({base}):\n    pass\n"
    )
    for engine in ("vllm", "transformers"):
        keys = {"inference_engine": engine, "trust_remote_code": True}
        policy = VLLMPolicyInference("policy", policy_job(tmp_path, directory, **keys))
        assert type(policy.tokenizer.tokenizer).__name__ == "OwnTokenizer"


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
    args |= {"long_prefill_token_threshold": 8}
    found, notices = arguments(model_dir, tmp_path, on_gpu=False, **args)
    assert found["enable_chunked_prefill"] is False
    assert found["max_num_batched_tokens"] == found["max_model_len"]
    assert any(notice.startswith("enable_chunked_prefill: off") for notice in notices)
    assert any(notice.startswith("max_num_batched_tokens: 16 becomes") for notice in notices)
    assert "long_prefill_token_threshold" not in found
    assert any(notice.startswith("long_prefill_token_threshold: left out") for notice in notices)
    found, _ = arguments(model_dir, tmp_path, on_gpu=True, **args)
    assert found["enable_chunked_prefill"] and found["max_num_batched_tokens"] == 16
    assert found["long_prefill_token_threshold"] == 8
