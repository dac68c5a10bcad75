"""How do the ranks of pipeline stages, which schedule for themselves, do so alike?

Every scheduler needs the output of each step, and only the last stage has one. With vLLM's
`external_launcher` the stages wait for each other in the middle of a step, where the last one hands
on its logits, so that only one of them works at a time. Here a stage passes on what its layers made
and goes on with the next batch, as under an executor that schedules for all; the output comes when
the scheduler asks for it. Their caches have equally many blocks, whatever layers they have.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import deque
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist

from chatlearn_vllm.engines.late_result import LateResult

_NUM_TAGS = 2**30
"""Steps after which tags begin again; tag 0 is that of vLLM's own messages."""


def config_of_stage(config: Any) -> Any:
    """vLLM's config for the worker of one of several stages.

    Args:
        config: `vllm.config.VllmConfig` of the engine. What the worker sets in its parts is seen
            there too, but for `parallel_config`.

    Returns:
        One whose worker takes its place among the GPUs as it is given, like those of Ray.
    """
    own = copy.copy(config)
    own.parallel_config = copy.copy(config.parallel_config)
    own.parallel_config.distributed_executor_backend = "ray"
    return own


class PipelineStages:
    """This rank among those that hold the same shard of other layers."""

    def __init__(self, group: Any, most_at_once: int) -> None:
        """On every rank.

        Args:
            group: `vllm.distributed.get_pp_group()`.
            most_at_once: steps that an engine begins before it asks for the output of the first.
        """
        self.number = group.rank_in_group
        """Of this stage, from 0."""
        self._group = group.cpu_group
        self._earlier, self._last = list(group.ranks[:-1]), group.ranks[-1]
        self._is_last = group.is_last_rank
        self._num_steps = 0
        self._most_at_once = most_at_once
        self._sent: deque[list[tuple[dist.Work, torch.Tensor]]] = deque()
        """By step, what has to stay until it has arrived."""

    def of_all(self, value: Any) -> list[Any]:
        """What each stage passes here, in their order; collective over them."""
        values: list[Any] = [None] * (len(self._earlier) + 1)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def exchange(self, request_ids: list[str], output: Any) -> Any:
        """Say what a step sampled, or ask for it; once per step, in their order.

        Args:
            request_ids: of the step, in the order in which they were scheduled, which is the same
                everywhere. The ids are this rank's own: vLLM puts random letters behind each.
            output: `vllm.v1.outputs.ModelRunnerOutput` or a future of it; of no use on the earlier
                stages.

        Returns:
            The last stage's output, or a future of it; on the other stages always a future, which
            waits for the last one when its result is asked for.
        """
        tag = 1 + self._num_steps % _NUM_TAGS
        self._num_steps += 1
        if not self._is_last:
            return LateResult(lambda: _renamed(*self._receive(tag), request_ids))
        if not isinstance(output, Future):
            return self._send(request_ids, output, tag)
        if not output.done():  # the GPU still works on it
            return LateResult(lambda: self._send(request_ids, output.result(), tag))
        self._send(request_ids, output.result(), tag)
        return output

    def _send(self, request_ids: list[str], output: Any, tag: int) -> Any:
        if len(self._sent) == self._most_at_once:
            for work, _ in self._sent.popleft():
                work.wait()  # has arrived: without it this step could not have begun there
        message = bytearray(pickle.dumps((request_ids, output)))
        data = torch.frombuffer(message, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        self._sent.append(
            [
                (dist.isend(tensor, dst=rank, group=self._group, tag=tag), tensor)
                for rank in self._earlier
                for tensor in (size, data)
            ]
        )
        return output

    def _receive(self, tag: int) -> tuple[list[str], Any]:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, src=self._last, group=self._group, tag=tag)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, src=self._last, group=self._group, tag=tag)
        return pickle.loads(data.numpy().tobytes())


def _renamed(ids: list[str], output: Any, own_ids: list[str]) -> Any:
    """Another rank's output, with this one's ids of the same requests."""
    own = dict(zip(ids, own_ids, strict=True))
    output.req_ids = [own[name] for name in output.req_ids]
    for field in dataclasses.fields(output):
        if isinstance(by_id := getattr(output, field.name), dict):
            setattr(output, field.name, {own[name]: value for name, value in by_id.items()})
    return output
