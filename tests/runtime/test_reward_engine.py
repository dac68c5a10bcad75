"""Are a reward model's pairs drawn, learned, compared, saved and resumed? All parts real."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from chatlearn_vllm.observability.metrics import read_metrics
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.reward_engine import RewardEngine
from examples.megatron.models.reward_trainer import RewardTrainer
from tests.data.test_prompts import write_jsonl
from tests.helpers.tiny_llama import save_tiny_llama

JOB = """
models:
  reward_trainer:
    num_gpu: 2
    trainable: True
    generation_batch_size: 4
    model_args:
      {{load: {load}, save: "{output}/saved", seq_length: 16, max_new_tokens: 6, lr: 3e-3,
        max_tokens_per_micro_batch: 64}}
runtime:
  num_episode: 3
  sample_per_episode: 16
  train_global_batch_size: 8
  data_path: {data}
  eval_data_path: {eval_data}
  eval_data_num_limit: 3
  eval_episode_interval: 2
  save_episode_interval: 1
  output_dir: {output}
  exp_name: run
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and pairs whose better response ends with an exclamation mark."""
    root = tmp_path_factory.mktemp("reward")
    save_tiny_llama(root / "policy")
    data = write_jsonl(
        root / "train.jsonl",
        *({"prompt": f"{n}:", "response": f"{n}!", "rejected": f"{n}?"} for n in range(24)),
    )
    # One pair is longer than seq_length; three do not divide by two ranks.
    eval_data = write_jsonl(
        root / "eval.jsonl",
        {"prompt": "abc", "response": ["x!", "y?"], "score": [2, 1]},
        {"prompt": "d" * 20, "chosen": "eeee!", "rejected": "eeee?fgh"},
        {"prompt": "9", "chosen": "!", "rejected": "?"},
        {"prompt": "beyond eval_data_num_limit", "chosen": "?", "rejected": "!"},
    )
    return {"load": root / "policy", "data": data, "eval_data": eval_data}


@pytest.fixture(scope="module")
def whole_run(shared_cluster, inputs, tmp_path_factory):
    """Three episodes in one go: directory and metrics."""
    output = tmp_path_factory.mktemp("whole")
    return output, engine(output, inputs).learn()


def test_the_pairs_are_learned(whole_run):
    output, history = whole_run
    assert [line["episode"] for line in history] == [1, 2, 3]
    assert ["eval/accuracy" in line for line in history] == [False, True, True]
    assert history[-1]["eval/accuracy"] == 1.0 and history[-1]["eval/num_pairs"] == 3
    assert history[0]["train/loss"] > history[-1]["train/loss"]
    assert history[-1]["train/accuracy"] == 1.0
    assert history[-1]["train/reward_margin"] > 0.1


def test_the_saved_model_gives_the_margin_that_was_reported(whole_run):
    output, history = whole_run
    model = AutoModelForSequenceClassification.from_pretrained(
        output / "saved" / "hf", dtype=torch.float32
    )
    codes = {character: 3 + ord(character) - 32 for character in map(chr, range(32, 127))}
    # seq_length 16 - max_new_tokens 6 leaves the last 10 tokens of a prompt; "eeee?f" is cut.
    sides = [["abcx!", "d" * 10 + "eeee!", "9!"], ["abcy?", "d" * 10 + "eeee?f", "9?"]]
    rewards = [[], []]
    for side, texts in enumerate(sides):
        for text in texts:
            ids = [codes[character] for character in text] + [2] * (not text.endswith("f"))
            with torch.no_grad():
                rewards[side].append(model(torch.tensor([ids])).logits.item())
    margin = torch.tensor(rewards[0]) - torch.tensor(rewards[1])
    assert history[-1]["eval/reward_margin"] == pytest.approx(margin.mean().item(), rel=1e-4)


@pytest.mark.slow  # two jobs
def test_a_run_that_ended_early_goes_on_to_the_same_numbers(
    shared_cluster, whole_run, inputs, tmp_path
):
    engine(tmp_path, inputs, "runtime.num_episode=2").learn()
    (line,) = engine(tmp_path, inputs).learn()

    assert line["episode"] == 3
    for name in ("train/loss", "train/grad_norm", "eval/reward_margin"):
        assert line[name] == pytest.approx(whole_run[1][-1][name], rel=1e-6)
    episodes = [line["episode"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert episodes == [1, 2, 3]


def test_a_bad_pair_is_named_before_anything_starts(inputs, tmp_path):
    made = engine(tmp_path, inputs)
    made.set_dataset([{"prompt": "?", "response": "!"}])
    with pytest.raises(ValueError, match=r"records\[0\]: key 'rejected' is None"):
        made.setup()
    made = engine(tmp_path, inputs)
    made.set_dataset([{"prompt": "?", "response": ["a", "b"], "score": [1, 1]}])
    with pytest.raises(ValueError, match="no record has a better and a worse response"):
        made.setup()


def test_a_micro_batch_without_room_for_a_pair_is_refused_before_anything_starts(inputs, tmp_path):
    limit = "models.reward_trainer.model_args.max_tokens_per_micro_batch=31"
    with pytest.raises(ValueError, match="=31 must be at least 2 x seq_length = 32"):
        engine(tmp_path, inputs, limit)


def engine(output, inputs, *overrides):
    path = output / "job.yaml"
    path.write_text(JOB.format(output=output, **inputs))
    session.init(str(path), list(overrides))
    return RewardEngine(RewardTrainer("reward_trainer"))
