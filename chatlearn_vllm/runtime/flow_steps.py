"""What batch does each call of a flow get, and what is made of its result?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.job.flow import Call, Flow, FlowError, Handle
from chatlearn_vllm.modules.base import BaseModule


@runtime_checkable
class AnswersPrompts(Protocol):
    """What can be the policy of a flow; `VLLMModule` is."""

    def build_prompts(self, prompts: list[Any], is_eval: bool = False) -> int:
        """See `VLLMModule.build_prompts`."""

    def generate(self, prompt_indices: list[int], first_sample: int) -> Batch | None:
        """See `VLLMModule.generate`."""


def policy_call(flow: Flow, method: str) -> Call:
    """The call that answers the flow's prompts: the only one that gets its argument.

    Raises:
        FlowError: there is none, there are several, or a model is called that answers no prompts.
    """
    takers = flow.takers()
    example = f"samples = policy.{method}(prompts)"
    if not takers:
        raise FlowError(
            f"{flow.name} calls no policy; its argument stands for the prompts: {example}"
        )
    call = takers[0]
    if len(takers) > 1:
        raise FlowError(
            f"{flow.name} gives its argument, the prompts, to {', '.join(map(str, takers))}; only "
            "the policy gets it, once. The prompts' own fields travel with the policy's samples"
        )
    if not isinstance(call.module, AnswersPrompts):
        raise FlowError(
            f"{flow.name} gives its argument, the prompts, to {call}, which answers none: the "
            f"policy, a VLLMModule, gets it ({example}), and others get its samples"
        )
    if len(call.inputs) > 1:
        raise FlowError(f"{flow.name}: {call} takes the prompts and nothing else: {example}")
    for other in flow.calls:
        if other is not call and isinstance(other.module, AnswersPrompts):
            raise FlowError(
                f"{flow.name}: {other} is called on samples; a policy answers the prompts of the "
                f"data only, once: {example}"
            )
    return call


def run_flow(flow: Flow, run: Callable[[Call, Batch], Batch]) -> dict[Call, Batch]:
    """Make the calls of a flow, one after the other.

    Args:
        flow: of a policy's samples.
        run: makes one call on the columns of all its inputs (none for the policy's) and returns
            the columns that it adds.

    Returns:
        For each call the columns of its inputs and those that it added.

    Raises:
        FlowError: columns do not have equally many rows, or two inputs of a call disagree.
    """
    results: dict[Call, Batch] = {}
    for call in flow.calls:
        inputs = merged(flow, f"the inputs of {call}", call.inputs, results)
        added = run(call, dict(inputs))
        results[call] = {**inputs, **added}
        try:
            batch_size(results[call])
        except ValueError as error:
            raise FlowError(
                f"{flow.name}: what {call} returned ({sorted(added)}): {error}"
            ) from None
    return results


def merged(
    flow: Flow, what: str, handles: Iterable[Handle], results: Mapping[Call, Batch]
) -> Batch:
    """The columns of several handles as one batch.

    Where one was made of the other, its columns are the newer ones and count.

    Args:
        flow: that the handles are of.
        what: names them in an error.
        handles: of results, or of the flow's argument, which has no columns.
        results: of the calls so far.

    Raises:
        FlowError: they have different numbers of rows, or different columns of the same name,
            none of which was made of the other.
    """
    batch: Batch = {}
    origin: dict[str, Call] = {}
    calls = [handle.call for handle in handles if handle.call is not None]
    for call in calls:
        if batch_size(results[call]) != batch_size(results[calls[0]]):
            raise FlowError(
                f"{flow.name}: {what} have different numbers of rows: {batch_size(results[call])} "
                f"of {call}, {batch_size(results[calls[0]])} of {calls[0]}"
            )
        for key, value in results[call].items():
            if key in batch and origin[key].depends_on(call):
                continue
            is_newer = key not in batch or call.depends_on(origin[key])
            if not is_newer and not _is_equal(batch[key], value):
                raise FlowError(
                    f"{flow.name}: {what} disagree: {origin[key]} and {call} have different "
                    f"{key!r}; let one of them return another key, or make one of the two with "
                    "chatlearn_vllm.apply before"
                )
            batch[key], origin[key] = value, call
    return batch


def call_function(flow: Flow, call: Call, batch: Batch) -> tuple[Batch, dict[str, float]]:
    """Call what was given to `apply`; the columns it adds, and its metrics.

    Raises:
        FlowError: it returned something else.
    """
    returned = call.function(batch)
    columns, metrics = returned if isinstance(returned, tuple) else (returned, {})
    if not isinstance(columns, Mapping) or not isinstance(metrics, Mapping):
        raise FlowError(
            f"{flow.name}: {call} returned {type(returned).__name__}; a function given to apply "
            "returns a dict of columns, or a pair of that dict and a dict of metrics"
        )
    return dict(columns), dict(metrics)


def require_frozen(flow: Flow, modules: Iterable[BaseModule]) -> None:
    """Check that no model is called that is trained.

    Raises:
        FlowError: one is.
    """
    for module in modules:
        if module.module_args.trainable:
            raise FlowError(
                f"{flow.name} calls models.{module.name}, which is trainable; leave it out here, "
                f"or set models.{module.name}.trainable: False"
            )


def _is_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    return all(_is_equal_entry(mine, its) for mine, its in zip(one, other, strict=True))


def _is_equal_entry(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
