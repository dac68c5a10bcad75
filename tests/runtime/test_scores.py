"""What is a user told whose model returns something else than its role says?"""

import pytest
import torch

from chatlearn_vllm.runtime.scores import joined, required_column

NAN, INFINITY = float("nan"), float("inf")
MASK = torch.tensor([[0.0, 1.0], [1.0, 1.0]])


def test_parts_are_put_below_each_other():
    parts = [
        {"rewards": torch.ones(2), "text": ["a", "b"]},
        {"rewards": torch.zeros(1), "text": [""]},
    ]

    batch = joined("reward", "forward_step", parts, [2, 1])

    assert batch["rewards"].tolist() == [1.0, 1.0, 0.0]
    assert batch["text"] == ["a", "b", ""]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned NoneType; it returns a dict of columns"),
        (torch.ones(2), "returned Tensor; it returns a dict of columns"),
        ({}, "returned nothing in its dict"),
        ({"rewards": torch.ones(3)}, "returned 3 rows for 2 samples as 'rewards'"),
        ({"rewards": [1.0]}, "returned 1 rows for 2 samples as 'rewards'"),
        ({"rewards": torch.tensor(1.0)}, "returned a single value for 2 samples as 'rewards'"),
        ({"rewards": 1.0}, "returned a single value for 2 samples as 'rewards'"),
        ({"score": torch.ones(2)}, "on parts of a batch: batch 1 and batch 0 differ in keys"),
        ({"rewards": torch.ones(2, 1)}, "on parts of a batch: rewards differs between batches"),
    ],
)
def test_a_result_without_an_entry_per_sample_is_refused(result, message):
    parts = [{"rewards": torch.ones(1)}, result]

    with pytest.raises(ValueError, match=r"models.reward: forward_step\(\) " + message):
        joined("reward", "forward_step", parts, [1, 2])


@pytest.mark.parametrize("rewards", [torch.tensor([1, 0]), [1.0, 0.0], [True, False]])
def test_rewards_are_numbers_of_any_kind(rewards):
    column = required_column("reward", {"rewards": rewards}, "rewards")

    assert column.dtype == torch.float32 and column.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"reward": torch.ones(2)}, r"\[2\]; it returned 'reward'$"),
        ({"rewards": torch.ones(2, 1)}, r"\[2\]; it returned \[2, 1\]$"),
        ({"rewards": ["good", "bad"]}, r"\[2\]; torch says of what it returned: "),
        ({"rewards": [None, 1.0]}, r"\[2\]; torch says of what it returned: "),
        ({"rewards": [1.0, NAN]}, r"\[2\]; of 1 rows it is NaN or infinite: 1$"),
        ({"rewards": [NAN] * 5}, r"\[5\]; of 5 rows it is NaN or infinite: 0, 1, 2, 3, 4$"),
        ({"rewards": [-INFINITY] * 7}, r"\[7\]; of 7 rows it is .*: 0, 1, 2, 3, 4, \.\.\.$"),
    ],
)
def test_rewards_that_cannot_be_trained_on_are_refused(scores, message):
    with pytest.raises(ValueError, match="models.judge: .* return 'rewards', finite .*" + message):
        required_column("judge", scores, "rewards")


def test_what_is_predicted_for_each_token_counts_inside_the_mask_only():
    values = torch.tensor([[NAN, 1.0], [2.0, 3.0]])
    assert required_column("value", {"values": values}, "values", MASK)[1].tolist() == [2.0, 3.0]

    with pytest.raises(ValueError, match=r"\[2, 2\]; of 1 rows it is NaN or infinite: 1"):
        required_column("value", {"values": values.flip(0)}, "values", MASK.flip(1))
    with pytest.raises(ValueError, match=r"finite numbers \[2, 2\]; it returned \[2, 3\]"):
        required_column("value", {"values": torch.ones(2, 3)}, "values", MASK)
