"""Do batches keep their rows together, and are departures from the contract named?"""

import pytest
import torch

from chatlearn_vllm.data.batch import (
    batch_size,
    check_batch,
    check_rollout_shapes,
    concat,
    select,
    split,
)

SEQ_LENGTH = 8


def two_samples() -> dict:
    """The worked example at the top of data/batch.py."""
    return {
        "all_tokens": torch.tensor([[5, 6, 7, 2, 2, 2, 2, 2], [5, 6, 8, 9, 7, 2, 2, 2]]),
        "loss_mask": torch.tensor(
            [[0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]], dtype=torch.float32
        ),
        "logprobs": torch.tensor(
            [[0, -0.1, -0.2, 0, 0, 0, 0], [0, -0.3, -0.4, -0.5, 0, 0, 0]], dtype=torch.float32
        ),
        "no_padded_query_ids": [torch.tensor([5, 6]), torch.tensor([5, 6])],
        "str_prompts": ["ab", "ab"],
        "str_outputs": ["c", "dec"],
    }


def rows(*numbers: int) -> dict:
    return {"row": torch.tensor(numbers), "text": [str(number) for number in numbers]}


def as_lists(batch: dict) -> dict:
    return {
        key: torch.as_tensor(value).tolist() if key == "row" else value
        for key, value in batch.items()
    }


def test_the_worked_example_keeps_the_contract():
    check_batch(two_samples(), SEQ_LENGTH)


def test_the_mask_of_predictions_is_the_loss_mask_shifted_by_one():
    batch = two_samples()
    assert torch.equal(batch["logprobs"] != 0, batch["loss_mask"][:, 1:] != 0)


def test_keys_added_later_are_checked_too():
    batch = two_samples() | {"rewards": torch.zeros(2), "prompt_index": torch.tensor([4, 4])}
    check_batch(batch, SEQ_LENGTH)
    batch["rewards"] = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"rewards: is torch.float32 \[2, 1\], expected .* \[2\]"):
        check_batch(batch, SEQ_LENGTH)


def test_advantages_are_of_responses_or_of_tokens():
    for shape in ((2,), (2, SEQ_LENGTH - 1)):
        check_batch(two_samples() | {"advantages": torch.zeros(shape)}, SEQ_LENGTH)
    with pytest.raises(ValueError, match=r"advantages: .* \[2, 8\], expected .* \[2, 7\]"):
        check_batch(two_samples() | {"advantages": torch.zeros(2, 8)}, SEQ_LENGTH)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, "returned NoneType, expected a dict of columns"),
        ({"all_tokens": two_samples()["all_tokens"]}, "\n  loss_mask: missing"),
        (two_samples() | {"str_outputs": ["a"]}, "\n  str_outputs: has 1 rows, expected 2"),
        (select(two_samples(), [0]), "\n  all_tokens: has 1 rows, expected 2"),
        (
            two_samples() | {"logprobs": torch.zeros(2, 8)},
            r"\n  logprobs: is .* \[2, 8\], exp",
        ),
        (two_samples() | {"mine": 3}, "\n  mine: is a int, expected a tensor"),
    ],
)
def test_a_rollout_of_another_shape_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        check_rollout_shapes(batch, num_rows=2, seq_length=SEQ_LENGTH)


def test_a_rollout_may_have_keys_of_its_own_and_lack_others():
    batch = two_samples() | {"mine": [1, 2]}
    del batch["logprobs"], batch["str_prompts"]
    check_rollout_shapes(batch, num_rows=2, seq_length=SEQ_LENGTH)


def test_logprobs_on_the_prompt_are_allowed():
    batch = two_samples()
    batch["logprobs"][:, 0] = -1.5
    check_batch(batch, SEQ_LENGTH)


def test_a_response_without_any_token_is_allowed():
    batch = two_samples()
    batch["loss_mask"][0] = 0
    batch["logprobs"][0] = 0
    batch["all_tokens"][0, 2:] = 2
    check_batch(batch, SEQ_LENGTH)


def test_every_missing_key_is_listed():
    batch = two_samples()
    del batch["logprobs"], batch["str_prompts"]
    with pytest.raises(ValueError, match=r"logprobs: missing\n  str_prompts: missing"):
        check_batch(batch, SEQ_LENGTH)
    del batch["all_tokens"]
    with pytest.raises(ValueError, match=r"all_tokens: missing\n  logprobs: missing\n  str_pro"):
        check_batch(batch, SEQ_LENGTH)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("all_tokens", torch.zeros(2, 7, dtype=torch.int64), r"all_tokens: .* \[2, 7\], exp.*2, 8"),
        ("logprobs", torch.zeros(2, 8), r"logprobs: .* \[2, 8\], expected torch.float32 \[2, 7\]"),
        ("logprobs", torch.zeros(2, 7, dtype=torch.float64), r"logprobs: is torch.float64"),
        ("loss_mask", [0, 1], r"loss_mask: is a list"),
        ("str_outputs", ["only one"], r"str_outputs: has 1 rows, expected 2"),
        ("str_outputs", ["c", None], r"str_outputs\[1\]: is a NoneType, expected a str"),
        ("answer", "c", r"answer: is a str, expected a tensor \[2, ...\] or a list"),
        ("answer", torch.tensor(1), r"answer: is a scalar tensor, expected a tensor \[2, ...\] or"),
        ("no_padded_query_ids", [[5, 6], [5, 6]], r"no_padded_query_ids\[0\]: is list"),
        (
            "no_padded_query_ids",
            [torch.tensor([5, 6]), torch.tensor([5, 6], dtype=torch.int32)],
            r"no_padded_query_ids\[1\]: is torch.int32 \[2\], expected torch.int64 \[P\]",
        ),
        (
            "no_padded_query_ids",
            [torch.tensor([5, 6]), torch.tensor([[5, 6]])],
            r"no_padded_query_ids\[1\]: is torch.int64 \[1, 2\], expected torch.int64 \[P\]",
        ),
    ],
)
def test_a_wrong_shape_or_type_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        check_batch(two_samples() | {key: value}, SEQ_LENGTH)


def test_an_unsampled_eos_in_the_mask_is_found_by_its_logprob():
    batch = two_samples()
    batch["loss_mask"][1, 5] = 1  # the old mistake: the EOS pad after a cut response
    batch["loss_mask"][0, 3] = 0  # and a sampled EOS that is not counted
    with pytest.raises(ValueError, match=r"logprobs\[0\]: is not 0.0 on the padding, from entry 2"):
        check_batch(batch, SEQ_LENGTH)


@pytest.mark.parametrize(
    ("key", "index", "value", "message"),
    [
        ("all_tokens", (0, 1), 9, r"all_tokens\[0\]: does not start with no_padded_query_ids\[0\]"),
        ("all_tokens", (1, 6), 9, r"all_tokens\[1\]: is not one repeated id from position 5"),
        ("loss_mask", (1, 1), 1.0, r"loss_mask\[1\]: is not 0.0 on the prompt's 2 tokens"),
        ("loss_mask", (0, 2), 0.5, r"loss_mask: holds values other than 0.0 and 1.0"),
        ("logprobs", (0, 1), float("nan"), r"logprobs: holds infinite or NaN values"),
    ],
)
def test_wrong_content_is_named(key, index, value, message):
    batch = two_samples()
    batch[key][index] = value
    with pytest.raises(ValueError, match=message):
        check_batch(batch, SEQ_LENGTH)


@pytest.mark.parametrize("length", [1, SEQ_LENGTH - 1])
def test_prompt_and_response_have_at_least_one_token_each(length):
    ids = torch.arange(3, 3 + SEQ_LENGTH)
    batch = {
        "all_tokens": ids.repeat(2, 1),
        "loss_mask": torch.tensor([[0.0] * length + [1.0] * (SEQ_LENGTH - length)] * 2),
        "logprobs": torch.full((2, SEQ_LENGTH - 1), -0.5),
        "no_padded_query_ids": [ids[:length]] * 2,
        "str_prompts": ["", ""],
        "str_outputs": ["", ""],
    }
    check_batch(batch, SEQ_LENGTH)
    batch["no_padded_query_ids"] = [ids[:0], ids]
    with pytest.raises(ValueError) as error:
        check_batch(batch, SEQ_LENGTH)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "no_padded_query_ids[0]: has 0 tokens, expected 1 to 7",
        "no_padded_query_ids[1]: has 8 tokens, expected 1 to 7",
    ]


def test_concat_keeps_the_order_of_rows():
    joined = concat([rows(0, 1), rows(2)])
    assert as_lists(joined) == {"row": [0, 1, 2], "text": ["0", "1", "2"]}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"row": torch.tensor([1])}, r"batch 1 and batch 0 differ in keys \['text'\]"),
        ({"row": [1], "text": ["1"]}, r"row is a tensor in some batches and a list in others"),
        ({"row": torch.tensor([1.0]), "text": ["1"]}, r"row differs between batches in shape"),
        ({"row": torch.tensor([[1, 2]]), "text": ["1"]}, r"row differs between batches in shape"),
        ({"row": torch.tensor([1]), "text": []}, r"same length, got {'row': 1, 'text': 0}"),
    ],
)
def test_batches_that_do_not_fit_together_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        concat([rows(0), other])


def test_concat_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        concat([])


def test_select_takes_rows_in_the_given_order():
    chosen = select(rows(10, 11, 12), [2, 0, 2])
    assert torch.equal(chosen["row"], torch.tensor([12, 10, 12]))
    assert chosen["text"] == ["12", "10", "12"]
    assert batch_size(select(rows(10, 11), [])) == 0


@pytest.mark.parametrize(
    ("parts", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (4, [2, 1, 1, 1]), (5, [1] * 5)]
)
def test_split_cuts_nearly_equal_consecutive_parts(parts, sizes):
    batch = rows(0, 1, 2, 3, 4)
    pieces = split(batch, parts)
    assert [batch_size(piece) for piece in pieces] == sizes
    assert as_lists(concat(pieces)) == as_lists(batch)


@pytest.mark.parametrize("parts", [0, 3])
def test_split_into_empty_parts_is_refused(parts):
    with pytest.raises(ValueError, match=f"2 rows into {parts}"):
        split(rows(0, 1), parts)


def test_a_batch_with_unequal_lengths_has_no_size():
    with pytest.raises(ValueError, match="same length"):
        batch_size({"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match="no size"):
        batch_size({})
