"""Which tensors describe a batch of samples, and how they line up.

A batch is a `dict` whose every value has length B, the number of samples (rows): a tensor whose
first dimension is B, or a list of B entries. S is `seq_length` of the policy's yaml.

Every rollout batch has (`VLLMModule.decode_internal` makes it):

    all_tokens           int64 [B, S]      prompt, then response, then padding with the EOS id
    logprobs             float32 [B, S-1]  entry t is log p of token t+1; 0.0 on padding, and on
                                           the prompt unless `prompt_logprobs` is set
    loss_mask            float32 [B, S]    1.0 on sampled response tokens (a sampled EOS
                                           included), else 0.0
    no_padded_query_ids  B x int64 [P]     list of the prompts' token ids, P differs by row
    str_prompts          B x str           list of the prompts' texts
    str_outputs          B x str           list of the responses' texts

Added on the way, by:

    prompt_index    int64 [B]         framework: row in the prompt data set, equal in a GRPO group
    sample_index    int64 [B]         framework: ordinal of the row over the whole job
    weight_version  int64 [B]         framework: version of the weights that sampled the row
    token_versions  int64 [B, S-1]    framework, partial rollouts only: version of the weights that
                                      sampled token t+1, -1 where there is none
    beam_scores     float32 [B]       framework, beam search only: by which beams are compared
    rewards         float32 [B]       reward: of the whole response
    accuracy        float32 [B]       reward, if it can tell: 1.0 for a right response, 0.0 else
    ref_logprobs    float32 [B, S-1]  reference: as `logprobs`, under the frozen model
    old_logprobs    float32 [B, S-1]  trainer: as `logprobs`, before its first update
    values          float32 [B, S-1]  value, in PPO: entry t before token t+1 is sampled
    returns         float32 [B, S-1]  framework, in PPO: what values should have been
    advantages      float32 [B]       framework: of the whole response; or [B, S-1], of each token

Every further field of a prompt record (`answer`, ...) travels along as a list of B entries.

Alignment: tensors over positions have S entries, tensors over predictions S-1. A mask for
`logprobs` is therefore `loss_mask[:, 1:]`; nothing else is ever shifted.

Example with S = 8, EOS id 2 and one prompt (5, 6) that was answered twice. The first response is
(7, 2): the model ended it by sampling EOS, which is an action like any other. The second is
(8, 9, 7): it was cut at three new tokens, so the EOS ids after it are padding and no action.

    all_tokens          [[5, 6, 7, 2, 2, 2, 2, 2],
                         [5, 6, 8, 9, 7, 2, 2, 2]]
    loss_mask           [[0, 0, 1, 1, 0, 0, 0, 0],
                         [0, 0, 1, 1, 1, 0, 0, 0]]
    logprobs            [[0, log p(7), log p(2), 0, 0, 0, 0],
                         [0, log p(8), log p(9), log p(7), 0, 0, 0]]
    no_padded_query_ids [tensor([5, 6]), tensor([5, 6])]
"""

from collections.abc import Sequence
from typing import Any

import torch

Batch = dict[str, Any]

ROLLOUT_KEYS = (
    "all_tokens",
    "logprobs",
    "loss_mask",
    "no_padded_query_ids",
    "str_prompts",
    "str_outputs",
)
"""Keys that every rollout batch has."""

ADDED_KEYS = (
    "prompt_index",
    "sample_index",
    "weight_version",
    "token_versions",
    "beam_scores",
    "rewards",
    "accuracy",
    "ref_logprobs",
    "old_logprobs",
    "advantages",
)
"""Keys that a batch may have as well, with a meaning fixed above."""


def batch_size(batch: Batch) -> int:
    """Return B, the length that all values share.

    Raises:
        ValueError: the batch is empty or its values differ in length.
    """
    if not batch:
        raise ValueError("a batch without any key has no size")
    sizes = {key: len(value) for key, value in batch.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all values of a batch must have the same length, got {sizes}")
    return next(iter(sizes.values()))


def concat(batches: Sequence[Batch]) -> Batch:
    """Put the rows of several batches below each other, in order.

    Raises:
        ValueError: no batch is given, or their keys, types or shapes after the first dimension
            differ.
    """
    if not batches:
        raise ValueError("concat needs at least one batch")
    keys = batches[0].keys()
    for number, batch in enumerate(batches):
        if batch.keys() != keys:
            differing = sorted(batch.keys() ^ keys)
            raise ValueError(f"batch {number} and batch 0 differ in keys {differing}")
        batch_size(batch)
    return {key: _concat_values(key, [batch[key] for batch in batches]) for key in keys}


def select(batch: Batch, rows: Sequence[int] | torch.Tensor) -> Batch:
    """Return the given rows, in the given order; a row may be taken more than once."""
    index = torch.as_tensor(rows, dtype=torch.int64)
    positions = index.tolist()
    return {
        key: value[index.to(value.device)]
        if isinstance(value, torch.Tensor)
        else [value[position] for position in positions]
        for key, value in batch.items()
    }


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into consecutive parts whose sizes differ by at most one, larger ones first.

    Tensors in the parts are views. `concat(split(batch, parts))` equals `batch`.

    Raises:
        ValueError: `parts` is not in [1, B].
    """
    size = batch_size(batch)
    if not 1 <= parts <= size:
        raise ValueError(f"cannot split a batch of {size} rows into {parts} non-empty parts")
    small, num_larger = divmod(size, parts)
    bounds = [part * small + min(part, num_larger) for part in range(parts + 1)]
    return [
        {key: value[start:stop] for key, value in batch.items()}
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def check_batch(batch: Batch, seq_length: int) -> None:
    """Compare a rollout batch with the contract at the top of this file.

    Users call it in the test of their own `decode_internal`.

    Args:
        batch: what `decode_internal` returned, with or without the keys added later.
        seq_length: S, the length to which `all_tokens` is padded.

    Raises:
        ValueError: lists every departure, with key, found and expected shape or value.
    """
    problems = [f"{key}: missing" for key in ROLLOUT_KEYS if key not in batch]
    if not problems:
        size = len(batch["all_tokens"])
        problems += _length_problems(batch, size)
        problems += _tensor_problems(batch, size, seq_length)
        problems += _list_problems(batch)
    if not problems:
        problems = _content_problems(batch, seq_length)
    if problems:
        raise ValueError(
            "batch breaks the contract of chatlearn_vllm/data/batch.py:\n  " + "\n  ".join(problems)
        )


def check_rollout_shapes(batch: Any, num_rows: int, seq_length: int) -> None:
    """Compare what can be compared in no time: `check_batch` without a look into the tensors.

    Args:
        batch: what `decode_internal` returned.
        num_rows: B, as many as there were responses.
        seq_length: S.

    Raises:
        ValueError: lists every departure; of all keys only `all_tokens` and `loss_mask` must be
            there.
    """
    if not isinstance(batch, dict):
        raise ValueError(f"returned {type(batch).__name__}, expected a dict of columns")
    problems = [f"{key}: missing" for key in ("all_tokens", "loss_mask") if key not in batch]
    problems += _length_problems(batch, num_rows)
    problems = problems or _tensor_problems(batch, num_rows, seq_length)
    if problems:
        raise ValueError(
            "breaks the contract of chatlearn_vllm/data/batch.py:\n  " + "\n  ".join(problems)
        )


def _concat_values(key: str, values: list[Any]) -> Any:
    kinds = {isinstance(value, torch.Tensor) for value in values}
    if len(kinds) > 1:
        raise ValueError(f"{key} is a tensor in some batches and a list in others")
    if kinds == {False}:
        return [entry for value in values for entry in value]
    shapes = {(tuple(value.shape[1:]), value.dtype) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"{key} differs between batches in shape after [B] or dtype: {shapes}")
    return torch.cat(values)


def _length_problems(batch: Batch, size: int) -> list[str]:
    problems = []
    for key, value in batch.items():
        is_tensor = isinstance(value, torch.Tensor)
        if not isinstance(value, list) and not (is_tensor and value.dim() > 0):
            kind = "scalar tensor" if is_tensor else type(value).__name__
            problems.append(f"{key}: is a {kind}, expected a tensor [{size}, ...] or a list")
        elif len(value) != size:
            problems.append(f"{key}: has {len(value)} rows, expected {size}")
    return problems


def _tensor_problems(batch: Batch, size: int, seq_length: int) -> list[str]:
    per_position, per_prediction, per_row = (size, seq_length), (size, seq_length - 1), (size,)
    expected = {
        "all_tokens": (torch.int64, per_position),
        "logprobs": (torch.float32, per_prediction),
        "loss_mask": (torch.float32, per_position),
        "prompt_index": (torch.int64, per_row),
        "sample_index": (torch.int64, per_row),
        "weight_version": (torch.int64, per_row),
        "token_versions": (torch.int64, per_prediction),
        "rewards": (torch.float32, per_row),
        "ref_logprobs": (torch.float32, per_prediction),
        "old_logprobs": (torch.float32, per_prediction),
        "values": (torch.float32, per_prediction),
        "returns": (torch.float32, per_prediction),
        "advantages": (torch.float32, per_row),
    }
    if torch.is_tensor(advantages := batch.get("advantages")) and advantages.dim() > 1:
        expected["advantages"] = (torch.float32, per_prediction)
    problems = []
    for key, (dtype, shape) in expected.items():
        if key not in batch:
            continue
        value = batch[key]
        if not isinstance(value, torch.Tensor):
            problems.append(f"{key}: is a {type(value).__name__}, expected a tensor {list(shape)}")
        elif value.dtype != dtype or tuple(value.shape) != shape:
            problems.append(
                f"{key}: is {value.dtype} {list(value.shape)}, expected {dtype} {list(shape)}"
            )
    return problems


def _list_problems(batch: Batch) -> list[str]:
    problems = []
    for key in ("str_prompts", "str_outputs"):
        for row, text in enumerate(batch[key]):
            if not isinstance(text, str):
                problems.append(f"{key}[{row}]: is a {type(text).__name__}, expected a str")
    for row, ids in enumerate(batch["no_padded_query_ids"]):
        is_tensor = isinstance(ids, torch.Tensor)
        if not is_tensor or ids.dtype != torch.int64 or ids.dim() != 1:
            found = f"{ids.dtype} {list(ids.shape)}" if is_tensor else type(ids).__name__
            problems.append(f"no_padded_query_ids[{row}]: is {found}, expected torch.int64 [P]")
    return problems


def _content_problems(batch: Batch, seq_length: int) -> list[str]:
    problems = []
    mask = batch["loss_mask"]
    if not ((mask == 0) | (mask == 1)).all():
        problems.append("loss_mask: holds values other than 0.0 and 1.0")
    for key in ("logprobs", "ref_logprobs", "old_logprobs"):
        if key in batch and not batch[key].isfinite().all():
            problems.append(f"{key}: holds infinite or NaN values")
    for row, prompt_ids in enumerate(batch["no_padded_query_ids"]):
        length = len(prompt_ids)
        if not 1 <= length < seq_length:
            problems.append(
                f"no_padded_query_ids[{row}]: has {length} tokens, expected 1 to {seq_length - 1}"
            )
            continue
        tokens = batch["all_tokens"][row]
        if not torch.equal(tokens[:length], prompt_ids.to(tokens.device)):
            problems.append(f"all_tokens[{row}]: does not start with no_padded_query_ids[{row}]")
        if mask[row, :length].any():
            problems.append(f"loss_mask[{row}]: is not 0.0 on the prompt's {length} tokens")
        problems += _padding_problems(batch, row, length)
    return problems


def _padding_problems(batch: Batch, row: int, prompt_length: int) -> list[str]:
    """Check that nothing follows the last sampled token but one repeated id without logprobs."""
    mask = batch["loss_mask"][row]
    sampled = mask.nonzero()
    end = int(sampled[-1]) + 1 if len(sampled) else prompt_length
    problems = []
    if batch["all_tokens"][row, end:].unique().numel() > 1:
        problems.append(
            f"all_tokens[{row}]: is not one repeated id from position {end} on, "
            "where loss_mask says that padding starts"
        )
    if batch["logprobs"][row, end - 1 :].any():
        problems.append(f"logprobs[{row}]: is not 0.0 on the padding, from entry {end - 1} on")
    return problems
