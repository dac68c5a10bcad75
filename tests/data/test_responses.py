"""Do given responses become rows that a model can learn from?"""

import json

import pytest
from transformers import AutoTokenizer

from chatlearn_vllm.data.responses import require_eos, response_rows
from examples.megatron.make_tiny_llama import write_tokenizer


def test_responses_stand_behind_their_prompts_and_are_what_is_learned() -> None:
    rows = response_rows([[1, 5], [1]], [[6, 2], [7, 8, 2]], seq_length=5, pad_id=2)
    assert rows["all_tokens"].tolist() == [[1, 5, 6, 2, 2], [1, 7, 8, 2, 2]]
    assert rows["loss_mask"].tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 1, 0]]


def test_a_tokenizer_without_eos_is_refused_with_its_directory(tmp_path) -> None:
    write_tokenizer(tmp_path, model_max_length=64)
    require_eos(AutoTokenizer.from_pretrained(tmp_path), str(tmp_path))
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} has no eos_token"):
        require_eos(AutoTokenizer.from_pretrained(tmp_path), str(tmp_path))
