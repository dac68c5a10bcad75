"""Is a job told before it starts that its model has no positions or tokens for what it asks?"""

import json

import pytest
import yaml

from chatlearn_vllm import RewardModule, load_config
from chatlearn_vllm.config import UserError
from chatlearn_vllm.runtime import base_engine
from chatlearn_vllm.runtime.eval_engine import EvalEngine
from chatlearn_vllm.runtime.rollout_checks import check_model_has, check_room_for_rollouts
from examples.megatron.models.online_dpo_trainer import OnlineDPOTrainer
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.engines import policy_job

CONFIG = {"vocab_size": 100, "max_position_embeddings": 48}


def policy(tmp_path, config, **model_args):
    model_dir = tmp_path / "model"
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(config))
    return VLLMPolicyInference("policy", policy_job(tmp_path, model_dir, **model_args))


def test_no_sequence_is_longer_than_the_positions(tmp_path) -> None:
    check_model_has(policy(tmp_path, CONFIG, seq_length=48))
    long = policy(tmp_path, CONFIG, seq_length=49)
    with pytest.raises(UserError, match="policy: seq_length=49 must be at most 48, for which"):
        check_model_has(long)
    check_model_has(policy(tmp_path, CONFIG, seq_length=16, max_model_len=48))
    with pytest.raises(UserError, match="policy: max_model_len=49 must be at most 48, for which"):
        check_model_has(policy(tmp_path, CONFIG, seq_length=16, max_model_len=49))


@pytest.mark.parametrize(
    ("more", "model_args"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}),
        ({"model_max_length": 64}, {}),
        ({}, {"hf_overrides": {"max_position_embeddings": 64}}),
        ({"max_position_embeddings": None}, {}),
        ({}, {"inference_engine": "transformers"}),
    ],
)
def test_models_that_go_further_are_not_refused(tmp_path, more, model_args) -> None:
    check_model_has(policy(tmp_path, CONFIG | more, seq_length=64, **model_args))


def test_tokens_are_those_of_the_model(tmp_path) -> None:
    check_model_has(policy(tmp_path, CONFIG, seq_length=48, stop_token_ids=[99]))
    for key, value in (("stop_token_ids", [99, 100]), ("logit_bias", {100: 1.0})):
        with pytest.raises(UserError, match=f"{key}: token 100 is none of the 100 that"):
            check_model_has(policy(tmp_path, CONFIG, seq_length=48, **{key: value}))


@pytest.mark.parametrize("key", ["num_beams", "eval_num_beams"])
def test_beams_find_twice_as_many_tokens_in_the_vocabulary(tmp_path, key) -> None:
    check_model_has(policy(tmp_path, CONFIG, seq_length=48, **{key: 50}))
    with pytest.raises(UserError, match=f"policy: {key}=51 must be at most 50: of each beam twice"):
        check_model_has(policy(tmp_path, CONFIG, seq_length=48, **{key: 51}))


def reader(tmp_path, cls, **model_args):
    keys = {"load": str(tmp_path), "seq_length": 16, "max_new_tokens": 8, **model_args}
    (tmp_path / "reader.yaml").write_text(yaml.safe_dump(keys))
    num_gpu = model_args.get("tensor_model_parallel_size", 1)
    model = {"num_gpu": num_gpu, "model_config_file": "reader.yaml"}
    runtime = {"sample_per_episode": 8, "output_dir": str(tmp_path)}
    job = {"models": {"reader": model}, "runtime": runtime}
    (tmp_path / "reader_job.yaml").write_text(yaml.safe_dump(job))
    return cls("reader", load_config(tmp_path / "reader_job.yaml"))


@pytest.mark.parametrize(
    ("cls", "least", "what"),
    [(RewardModule, 48, "a sequence"), (OnlineDPOTrainer, 96, "a pair of responses")],
)
def test_micro_batches_have_room_for_the_policys_longest_sequence(
    tmp_path, cls, least, what
) -> None:
    sampler = policy(tmp_path, CONFIG, seq_length=48)
    for limit in (None, least):
        enough = reader(tmp_path, cls, max_tokens_per_micro_batch=limit)
        check_room_for_rollouts(sampler, [enough])
    few = reader(tmp_path, cls, max_tokens_per_micro_batch=least - 1)
    message = f"models.reader: max_tokens_per_micro_batch={least - 1} must be at least {least}: "
    with pytest.raises(UserError, match=message + what):
        check_room_for_rollouts(sampler, [enough, few])
    few.reads_policy_tokens = False
    check_room_for_rollouts(sampler, [few, policy(tmp_path, CONFIG, seq_length=16)])


@pytest.mark.parametrize("case", ["sequence parallel", "experts", "neither"])
def test_sequences_are_cut_into_equal_parts_by_sequence_parallel_ranks(tmp_path, case) -> None:
    sampler = policy(tmp_path, CONFIG, seq_length=47)
    experts = {"num_local_experts": 4} if case == "experts" else {}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | experts))
    keys = {"tensor_model_parallel_size": 4, "sequence_parallel": case == "sequence parallel"}
    exact = reader(tmp_path, RewardModule, max_tokens_per_micro_batch=47, **keys)
    if case == "neither":
        check_room_for_rollouts(sampler, [exact])
        return
    with pytest.raises(UserError, match="=47 must be at least 48: .* is 47, in 4 equal parts"):
        check_room_for_rollouts(sampler, [exact])
    enough = reader(tmp_path, RewardModule, max_tokens_per_micro_batch=48, **keys)
    check_room_for_rollouts(sampler, [enough])


def test_it_is_told_before_anything_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(base_engine, "Cluster", None)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')
    module = policy(tmp_path, CONFIG, seq_length=64, load_format="auto")
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    engine = EvalEngine(lambda prompts: module.eval_forward(prompts))
    engine.set_dataset([{"prompt": "1+1="}])
    with pytest.raises(UserError, match="seq_length=64 must be at most 48"):
        engine.eval()
