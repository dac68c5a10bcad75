"""Does a Hugging Face reward model score each response as transformers alone does?"""

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


def expected(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
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
