"""Is a checkpoint that is not exactly the model's refused?"""

import pytest
import torch

from chatlearn_vllm.engines.whole_tensors import checked_tensors
from tests.helpers.reference_shards import logical_tensors, tiny_shape

MODEL = tiny_shape("mixtral", layers=1)
CHECKPOINT = list(logical_tensors(MODEL).items())


def test_every_tensor_of_a_whole_checkpoint_is_passed_on_as_it_comes() -> None:
    passed = list(checked_tensors(iter(CHECKPOINT), MODEL))
    assert [name for name, _ in passed] == [name for name, _ in CHECKPOINT]
    assert all(a is b for (_, a), (_, b) in zip(passed, CHECKPOINT, strict=True))


@pytest.mark.parametrize("place", [0, len(CHECKPOINT) // 2, len(CHECKPOINT) - 1])
def test_a_tensor_that_did_not_come_is_named_at_the_end(place) -> None:
    name, _ = CHECKPOINT[place]
    rest = CHECKPOINT[:place] + CHECKPOINT[place + 1 :]
    passed = []
    with pytest.raises(ValueError, match=f"1 tensors did not come: {name}$"):
        passed.extend(checked_tensors(rest, MODEL))


def test_five_of_many_that_did_not_come_are_named() -> None:
    names = sorted(name for name, _ in CHECKPOINT)
    for number, end in ((5, "$"), (6, r", \.\.\.$")):
        came = [(name, tensor) for name, tensor in CHECKPOINT if name not in names[:number]]
        shown = ", ".join(names[:5])
        with pytest.raises(ValueError, match=f"{number} tensors did not come: {shown}{end}"):
            list(checked_tensors(came, MODEL))


def test_a_tensor_that_is_unknown_or_comes_twice_or_has_another_shape_is_not_passed_on() -> None:
    name, tensor = CHECKPOINT[0]
    for wrong, problem in (
        (("lm_head.bias", tensor), "'lm_head.bias' is unknown, or came twice"),
        ((name, tensor), f"'{name}' is unknown, or came twice"),
        ((CHECKPOINT[1][0], tensor), r"is \(100, 8\), the model's is \(8,\)"),
    ):
        passed = checked_tensors([CHECKPOINT[0], wrong], MODEL)
        assert next(passed)[0] == name
        with pytest.raises(ValueError, match=problem):
            next(passed)


def test_a_transposed_tensor_is_refused() -> None:
    transposed = [(name, tensor.t()) for name, tensor in CHECKPOINT]
    with pytest.raises(ValueError, match=r"embed_tokens.weight' is \(8, 100\), .* is \(100, 8\)"):
        list(checked_tensors(transposed, MODEL))


def test_a_source_that_fails_is_not_taken_for_the_end() -> None:
    def tensors():
        yield CHECKPOINT[0]
        raise torch.OutOfMemoryError("gather")

    with pytest.raises(torch.OutOfMemoryError, match="gather"):
        list(checked_tensors(tensors(), MODEL))
