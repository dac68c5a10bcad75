"""Do given responses become rows that a model can learn from?"""

import json

import pytest
import torch
from transformers import AutoTokenizer

from chatlearn_vllm.data.responses import require_eos, response_rows
from examples.megatron.make_tiny_llama import write_tokenizer


def test_only_the_response_behind_its_prompt_is_marked() -> None:
    rows = response_rows([[5, 6], [7], [8]], [[3, 2], [], [4, 9, 2]], seq_length=5, pad_id=1)
    assert rows["all_tokens"].tolist() == [[5, 6, 3, 2, 1], [7, 1, 1, 1, 1], [8, 4, 9, 2, 1]]
    assert rows["loss_mask"].tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]
    assert rows["all_tokens"].dtype == torch.int64
    assert rows["loss_mask"].dtype == torch.float32


def test_each_prompt_needs_a_response() -> None:
    with pytest.raises(ValueError, match="shorter"):
        response_rows([[5], [6]], [[2]], seq_length=3, pad_id=1)


def test_a_tokenizer_without_eos_is_refused_with_its_directory(tmp_path) -> None:
    write_tokenizer(tmp_path, model_max_length=64)
    require_eos(AutoTokenizer.from_pretrained(tmp_path), str(tmp_path))
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} has no eos_token"):
        require_eos(AutoTokenizer.from_pretrained(tmp_path), str(tmp_path))
