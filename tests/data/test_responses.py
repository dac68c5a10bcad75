"""Do prompts and responses stand where a model is to learn from them?"""

import pytest
import torch

from chatlearn_vllm.data.responses import response_rows


def test_only_the_response_behind_its_prompt_is_marked():
    rows = response_rows([[5, 6], [7], [8]], [[3, 2], [], [4, 9, 2]], seq_length=5, pad_id=1)
    assert rows["all_tokens"].tolist() == [[5, 6, 3, 2, 1], [7, 1, 1, 1, 1], [8, 4, 9, 2, 1]]
    assert rows["loss_mask"].tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]
    assert rows["all_tokens"].dtype == torch.int64
    assert rows["loss_mask"].dtype == torch.float32


def test_each_prompt_needs_a_response():
    with pytest.raises(ValueError, match="shorter"):
        response_rows([[5], [6]], [[2]], seq_length=3, pad_id=1)
