"""Does a Hugging Face reward model score each response as transformers alone does?"""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from chatlearn_vllm.config import load_config
from chatlearn_vllm.modules.hf_reward_module import HFRewardModule
from tests.helpers.tiny_llama import save_tiny_llama

PROMPTS = ["1+1=", "20+30=", "7+8="]
RESPONSES = ["2", "50 and then some more words", ""]


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward")
    save_tiny_llama(directory)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)
    model.save_pretrained(directory)
    return directory


def module(directory, tmp_path, rows=2, **model_args):
    lines = "".join(f"      {key}: {value}\n" for key, value in model_args.items())
    path = tmp_path / "job.yaml"
    path.write_text(
        "models:\n  reward:\n    num_cpu: 1\n"
        f"    generation_batch_size: {rows}\n    model_args:\n      load: {directory}\n{lines}"
    )
    return HFRewardModule("reward", load_config(path))


def expected(directory, responses=RESPONSES):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    scores = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = torch.tensor([tokenizer(prompt + response)["input_ids"]])
        model.config.pad_token_id = None  # one row, without padding
        with torch.no_grad():
            scores.append(model(ids).logits[0, 0].item())
    return scores


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rewards_are_those_of_single_unpadded_rows(reward_dir, tmp_path, rows):
    reward = module(reward_dir, tmp_path, rows, dtype="float32")
    reward.model_setup()

    found = reward.forward_step({"str_prompts": PROMPTS, "str_outputs": RESPONSES})

    assert found["rewards"].tolist() == pytest.approx(expected(reward_dir), abs=1e-5)
    assert len(set(found["rewards"].tolist())) == 3


@pytest.mark.parametrize("pad_token", [None, "</s>"])
def test_the_score_is_that_of_the_last_token_if_it_is_what_others_pad_with(
    reward_dir, tmp_path, pad_token
):
    directory = tmp_path / "reward"
    shutil.copytree(reward_dir, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    ended = [f"{response}</s>" for response in RESPONSES]
    reward = module(directory, tmp_path, 8)
    reward.model_setup()

    found = reward.forward_step({"str_prompts": PROMPTS, "str_outputs": ended})["rewards"].tolist()

    assert found == pytest.approx(expected(directory, ended), abs=1e-5)
    assert found != pytest.approx(expected(directory), abs=1e-3)


@pytest.mark.parametrize("limit", ["tokenizer", "seq_length", "positions"])
def test_texts_that_are_too_long_lose_their_beginnings(reward_dir, tmp_path, caplog, limit):
    directory, keys, length = reward_dir, {}, 8
    if limit == "seq_length":
        keys = {"seq_length": 8, "max_new_tokens": 4}
    elif limit == "tokenizer":
        directory = tmp_path / "tokenizer"
        AutoTokenizer.from_pretrained(reward_dir, model_max_length=8).save_pretrained(directory)
        keys, directory = {"tokenizer": directory}, reward_dir
    else:
        length = 256
    reward = module(directory, tmp_path, **keys)
    reward.model_setup()
    answers = ["right", "wrong", "r"]
    long = {"str_prompts": ["a question" + "?" * 300] * 3, "str_outputs": answers}

    with caplog.at_level("WARNING"):
        found = reward.forward_step(long)["rewards"]
        reward.forward_step(long)

    ends = [text[-length:] for text in ("?" * 300 + answer for answer in answers)]
    short = reward.forward_step({"str_prompts": [""] * 3, "str_outputs": ends})["rewards"]
    torch.testing.assert_close(found, short)
    assert len(set(found.tolist())) == 3
    assert caplog.text.count(f"3 of 3 texts are longer than the {length} tokens") == 1


def test_rows_go_through_the_model_as_many_at_a_time_as_the_yaml_says(reward_dir, tmp_path):
    reward = module(reward_dir, tmp_path, rows=2)
    reward.model_setup()
    sizes = []
    reward.model.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    reward.forward_step({"str_prompts": PROMPTS, "str_outputs": RESPONSES})
    assert sizes == [2, 1]


@pytest.mark.parametrize(("dtype", "of_body"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_rewards_are_not_rounded_with_the_weights(reward_dir, tmp_path, dtype, of_body):
    directory = tmp_path / "bf16"
    shutil.copytree(reward_dir, directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    reward = module(directory, tmp_path, dtype=dtype)
    reward.model_setup()
    assert reward.model.model.embed_tokens.weight.dtype == getattr(torch, of_body)
    found = reward.forward_step({"str_prompts": PROMPTS, "str_outputs": RESPONSES})["rewards"]
    assert not torch.equal(found, found.bfloat16().float())


def test_a_model_without_a_trained_last_layer_is_refused(tmp_path):
    save_tiny_llama(tmp_path / "causal")
    config = json.loads((tmp_path / "causal/config.json").read_text())
    one_label = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    (tmp_path / "causal/config.json").write_text(json.dumps(config | one_label))
    with pytest.raises(ValueError, match="causal: has no weights of score.weight, which would be"):
        module(tmp_path / "causal", tmp_path).model_setup()


def test_a_model_with_several_labels_is_refused(reward_dir, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(
        reward_dir, num_labels=3, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(reward_dir).save_pretrained(tmp_path / "three")

    with pytest.raises(ValueError, match="models.reward: .*three: has 3 labels"):
        module(tmp_path / "three", tmp_path).model_setup()


def test_a_missing_directory_is_named(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("models: {reward: {num_cpu: 1}}\n")
    with pytest.raises(ValueError, match=r"models.reward: load must name"):
        HFRewardModule("reward", load_config(path)).model_setup()
