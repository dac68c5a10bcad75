"""Does an evaluation run from its yaml, with weights that vLLM loads itself? All parts real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tests.helpers.tiny_llama import save_tiny_llama

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = [{"prompt": f"{i}+{i + 7}=", "answer": str(2 * i + 7)} for i in range(10, 16)]
NEW_TOKENS = 12


def greedy_answers(model, directory):
    """What transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    answers = []
    for record in PROMPTS:
        tokens = torch.tensor([tokenizer.encode(record["prompt"])])
        output = model.generate(tokens, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        answers.append(tokenizer.decode(output[0, tokens.size(1) :], skip_special_tokens=True))
    return answers


def test_the_shipped_evaluation_answers_as_transformers_does(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    settings = {
        "policy_load": tmp_path / "model", "eval_data_path": prompts, "num_gpu_policy": 1,
        "output_dir": tmp_path, "seq_length": 32, "max_new_tokens": NEW_TOKENS, "max_num_seqs": 8,
    }  # fmt: skip

    done = subprocess.run(
        [sys.executable, "-m", "chatlearn_vllm.cli.main", "launch", "configs/llama2/eval.yaml"],
        cwd=REPOSITORY,
        env=os.environ | {key: str(value) for key, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    results = tmp_path / "eval" / "eval"
    lines = (results / "episode_000000.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    expected = greedy_answers(model, tmp_path / "model")
    assert [sample["str_outputs"] for sample in samples] == expected
    assert len(set(expected)) > 1  # the weights, and not a constant, give the answers
    assert {sample["weight_version"] for sample in samples} == {0}
    metrics = json.loads((results / "metrics.jsonl").read_text())
    assert metrics["eval/num_samples"] == len(PROMPTS)
    right = [sample["rewards"] for sample in samples]
    assert metrics["eval/reward_mean"] == sum(right) / len(right)
    table = (results / "episode_000000.txt").read_text()
    assert table.splitlines()[0].split() == ["metric", "value", "change"]
    assert table in done.stderr  # the same table is on the terminal
