"""Do finished requests become the batch that trainers expect?"""

from types import SimpleNamespace

import pytest
import torch

from chatlearn_vllm.data.rollouts import rollouts_to_batch


def entries(token_ids, logprobs):
    """vLLM's log-probabilities by position."""
    pairs = zip(token_ids, logprobs, strict=True)
    return [{token: SimpleNamespace(logprob=logprob)} for token, logprob in pairs]


def request(request_id, prompt, responses, prompt_logprobs=None):
    completions = [
        SimpleNamespace(token_ids=ids, text=f"{ids}", logprobs=entries(ids, logprobs))
        for ids, logprobs in responses
    ]
    return SimpleNamespace(
        request_id=request_id, prompt=f"{prompt}", prompt_token_ids=prompt, outputs=completions,
        prompt_logprobs=prompt_logprobs,
    )  # fmt: skip


def test_rows_hold_prompt_response_and_padding_and_only_sampled_tokens_are_actions() -> None:
    outputs = [
        request("0", [5, 6, 7], [([8, 9], [-0.5, -1.0]), ([4], [-0.25])]),
        request("1", [3], [([2, 2, 1], [-1.5, -2.0, -2.5])]),
    ]
    batch = rollouts_to_batch(outputs, seq_length=6, pad_token_id=0)
    assert batch["all_tokens"].tolist() == [
        [5, 6, 7, 8, 9, 0], [5, 6, 7, 4, 0, 0], [3, 2, 2, 1, 0, 0],
    ]  # fmt: skip
    assert batch["loss_mask"].tolist() == [
        [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0],
    ]  # fmt: skip
    assert batch["logprobs"].tolist() == [
        [0, 0, -0.5, -1.0, 0], [0, 0, -0.25, 0, 0], [-1.5, -2.0, -2.5, 0, 0],
    ]  # fmt: skip
    assert [ids.tolist() for ids in batch["no_padded_query_ids"]] == [[5, 6, 7]] * 2 + [[3]]
    assert batch["str_prompts"] == ["[5, 6, 7]", "[5, 6, 7]", "[3]"]
    assert batch["str_outputs"] == ["[8, 9]", "[4]", "[2, 2, 1]"]
    dtypes = {name: batch[name].dtype for name in ("all_tokens", "loss_mask", "logprobs")}
    assert dtypes == {
        "all_tokens": torch.int64, "loss_mask": torch.float32, "logprobs": torch.float32,
    }  # fmt: skip


def test_log_probabilities_of_the_prompt_stand_before_those_of_the_response() -> None:
    of_prompt = [None, *entries([6, 7], [-3.0, -4.0])]
    outputs = [
        request("0", [5, 6, 7], [([8], [-0.5]), ([], [])], of_prompt),
        request("1", [3, 4], [([8], [-0.25])], [None, *entries([4], [-2.0])]),
        request("2", [3, 4], [([9], [-0.75])]),
    ]
    batch = rollouts_to_batch(outputs, seq_length=5, pad_token_id=0)
    assert batch["logprobs"].tolist() == [
        [-3.0, -4.0, -0.5, 0], [-3.0, -4.0, 0, 0], [-2.0, -0.25, 0, 0], [0, -0.75, 0, 0],
    ]  # fmt: skip


def test_log_probabilities_of_fewer_tokens_than_there_are_are_refused() -> None:
    output = request("0", [5], [([8, 9], [-0.5, -1.0])])
    output.outputs[0].logprobs.pop()
    with pytest.raises(ValueError, match="longer"):
        rollouts_to_batch([output], seq_length=4, pad_token_id=0)


def test_a_tokenizer_without_eos_pads_with_zeros_that_no_mask_includes() -> None:
    output = request("0", [5, 6], [([8], [-0.5])])
    batch = rollouts_to_batch([output], seq_length=5, pad_token_id=None)
    assert batch["all_tokens"].tolist() == [[5, 6, 8, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 0, 0]]


def test_what_does_not_fit_or_lacks_log_probabilities_is_refused() -> None:
    output = request("7", [5, 6, 7], [([8, 9], [-0.5, -1.0])])
    with pytest.raises(ValueError, match=r"request 7: 3 prompt \+ 2 response tokens .*=4"):
        rollouts_to_batch([output], seq_length=4, pad_token_id=0)
    output.outputs[0].logprobs = None
    with pytest.raises(ValueError, match="request 7: no logprobs"):
        rollouts_to_batch([output], seq_length=5, pad_token_id=0)
