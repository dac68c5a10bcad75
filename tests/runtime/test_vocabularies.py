"""Is a job told before it starts that a model reads the policy's tokens as other ones?"""

import json

import pytest
import yaml

from chatlearn_vllm import DraftModule, GRPOEngine, RewardModule, ValueModule, load_config
from chatlearn_vllm.config import UserError
from chatlearn_vllm.modules.hf_reward_module import HFRewardModule
from chatlearn_vllm.runtime import base_engine
from chatlearn_vllm.runtime.vocabulary_checks import check_tokenizer, check_vocabularies
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.job_modules import DigitReward

TOKENS = {"a": 0, "b": 1}
END = [{"content": "</s>", "id": 2}]
UNIGRAM = [["a", -1.0], ["b", -2.0]]
READERS = [PolicyTrainer, PolicyReference, RewardModule, ValueModule, DraftModule]


def save(directory, vocab_size=None, vocab=None, added=END):
    """The files of a model that the check reads."""
    directory.mkdir()
    if vocab_size is not None:
        (directory / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    if vocab is not None:
        tokenizer = {"model": {"vocab": vocab}, "added_tokens": added}
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def make_job(directory, **model_args):
    """A policy and a reader; each loads the directory of its name."""
    models = {}
    for name in ("policy", "reader"):
        args = {"load": str(directory / name), "seq_length": 32, "max_new_tokens": 12}
        args |= model_args.get(name, {})
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(args))
        models[name] = {"num_gpu": 1, "model_config_file": f"{name}.yaml"}
    models["trained"] = {**models["reader"], "trainable": True}
    models["rules"] = {"num_cpu": 1}
    runtime = {"sample_per_episode": 8, "train_global_batch_size": 8, "output_dir": str(directory)}
    (directory / "job.yaml").write_text(yaml.safe_dump({"models": models, "runtime": runtime}))
    return load_config(directory / "job.yaml")


def check(directory, reader_class=RewardModule, **model_args):
    job = make_job(directory, **model_args)
    check_vocabularies(VLLMPolicyInference("policy", job), [reader_class("reader", job)])


@pytest.mark.parametrize("reader", READERS)
def test_another_size_is_refused_for_all_that_read_the_tokens(tmp_path, reader) -> None:
    save(tmp_path / "policy", 128)
    save(tmp_path / "reader", 100)
    message = (
        "models.reader reads the token ids of models.policy and has another vocabulary: "
        f"vocab_size is 128 in {tmp_path}/policy/config.json and 100 in "
        f"{tmp_path}/reader/config.json; load a model with the vocabulary of models.policy"
    )
    with pytest.raises(UserError, match=message):
        check(tmp_path, reader)


class TextReward(RewardModule):
    reads_policy_tokens = False


@pytest.mark.parametrize("reader", [HFRewardModule, DigitReward, TextReward])
def test_models_that_read_texts_may_have_another_vocabulary(tmp_path, reader) -> None:
    save(tmp_path / "policy", 128)
    save(tmp_path / "reader", 100)
    check(tmp_path, reader)


@pytest.mark.parametrize(
    ("vocab", "added", "message"),
    [
        (
            {"b": 0, "a": 1},
            END,
            "of 3 tokens in .* 2 are others .*'a' is token 0 there and token 1",
        ),
        ({"a": 0}, END, "1 are others among the 2 in .*'b' is token 1 there and none here"),
        (TOKENS, [{"content": "<end>", "id": 2}], "'</s>' is token 2 there and none here"),
    ],
)
def test_other_tokens_are_refused_though_the_sizes_agree(tmp_path, vocab, added, message) -> None:
    save(tmp_path / "policy", 128, TOKENS)
    save(tmp_path / "reader", 128, vocab, added)
    with pytest.raises(UserError, match=message):
        check(tmp_path)


@pytest.mark.parametrize(
    ("vocab", "added"),
    [(TOKENS, END), (UNIGRAM, END), (TOKENS, [*END, {"content": "<pad>", "id": 3}])],
)
def test_a_padded_vocabulary_and_more_tokens_pass(tmp_path, vocab, added) -> None:
    save(tmp_path / "policy", 128, TOKENS)
    save(tmp_path / "reader", 256, vocab, added)
    check(tmp_path)


def test_what_says_no_vocabulary_passes(tmp_path) -> None:
    save(tmp_path / "policy", 128, TOKENS)
    save(tmp_path / "reader")
    check(tmp_path)
    check(tmp_path, PolicyTrainer, reader={"load": None})


def test_the_tokens_are_those_of_the_tokenizer_that_the_policy_names(tmp_path) -> None:
    save(tmp_path / "policy", 128, TOKENS)
    save(tmp_path / "reader", 128, {"x": 0})
    check(tmp_path, policy={"tokenizer": str(tmp_path / "reader")})


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "tekken.json"])
def test_a_directory_with_a_tokenizer_passes(tmp_path, name) -> None:
    save(tmp_path / "policy", 128)
    save(tmp_path / "reader", 128)
    (tmp_path / "policy" / name).touch()
    check_tokenizer(VLLMPolicyInference("policy", make_job(tmp_path)))


def test_a_policy_without_tokenizer_is_refused_before_anything_starts(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(base_engine, "Cluster", None)
    save(tmp_path / "policy", 128)
    save(tmp_path / "reader", 128, TOKENS)
    (tmp_path / "policy" / "tokenizer_config.json").write_text("{}")
    make = {"num_inference_per_prompt": 2}
    with pytest.raises(UserError, match=r"models.policy: load=\S*/policy has no tokenizer"):
        learn(make_job(tmp_path, policy=make))
    own = {**make, "load": str(tmp_path / "reader"), "tokenizer": str(tmp_path / "policy")}
    with pytest.raises(UserError, match=r"models.policy: tokenizer=\S*/policy has no tokenizer"):
        learn(make_job(tmp_path, policy=own))


def learn(job):
    frozen = VLLMPolicyInference("policy", job), None, DigitReward("rules", job)
    engine = GRPOEngine(*frozen, PolicyTrainer("trained", job))
    engine.set_dataset([{"prompt": "1+1="}])
    engine.learn()


def test_a_micro_batch_without_room_is_refused_before_anything_starts(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(base_engine, "Cluster", None)
    save(tmp_path / "policy", 128, TOKENS)
    save(tmp_path / "reader", 128, TOKENS)
    few = {"seq_length": 16, "max_tokens_per_micro_batch": 31}
    job = make_job(tmp_path, policy={"num_inference_per_prompt": 2}, reader=few)
    with pytest.raises(UserError, match="models.trained: max_tokens_per_micro_batch=31 must be"):
        learn(job)


def test_it_is_told_before_anything_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(base_engine, "Cluster", None)
    save(tmp_path / "policy", 128)
    save(tmp_path / "reader", 100)
    job = make_job(tmp_path, policy={"num_inference_per_prompt": 2})
    with pytest.raises(UserError, match="models.trained reads the token ids of models.policy"):
        learn(job)
