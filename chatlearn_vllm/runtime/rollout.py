"""How do prompts become scored samples, over all replicas of a policy and of what scores them?

What the replicas can work on at once is split evenly; further prompts are handed to whichever
replica has room. Scoring models that are in memory get samples while the policy makes more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from chatlearn_vllm.data.batch import Batch, batch_size, concat, select
from chatlearn_vllm.data.carried import Carried
from chatlearn_vllm.runtime.scatter import split_evenly
from chatlearn_vllm.runtime.scores import joined
from chatlearn_vllm.runtime.worker_group import CallPool, WorkerGroup

PARTS_PER_REPLICA = 8
"""In so many parts a replica hands over its samples, if somebody waits for them."""
STEPS_PER_CALL = 64
"""Scheduler steps after which a replica of partial rollouts asks whether it should go on."""


@dataclass
class _Replica:
    """What a replica of the policy has been asked for."""

    number: int
    num_open: int = 0
    """Prompts given to it that it has not answered yet."""
    num_calls: int = 0
    """Calls that it has not ended yet."""


@dataclass
class _Scorer:
    """A model that scores samples while others are being made."""

    group: WorkerGroup
    parts: deque[tuple[int, Any]] = field(default_factory=deque)
    """Numbers of, and references to, samples that wait for a replica."""
    idle: list[int] = field(default_factory=list)
    """Replicas without work."""
    scores: dict[int, Batch] = field(default_factory=dict)
    """By the number of the part."""


class Rollout:
    """One pass of prompts through a policy.

    Example:
        rollout = Rollout(groups["policy"], max_open=32, scorers=[groups["reward"]])
        batch = rollout.generate(prompts, first_sample=0, samples_per_prompt=8, iteration=1)
        batch |= rollout.scores("reward")
    """

    def __init__(
        self,
        policy: WorkerGroup,
        max_open: int | None = None,
        scorers: Sequence[WorkerGroup] = (),
    ) -> None:
        """Say who works.

        Args:
            policy: ranks of a `VLLMModule`.
            max_open: prompts that one replica works on at once; the others of an episode wait for
                a free place on any replica. None: no limit, all are split beforehand.
            scorers: models that get samples as they come. All they see is in the rollout's batch.
        """
        self._policy = policy
        self._max_open = max_open
        self._pool = CallPool()
        self._scorers = {
            group.name: _Scorer(group, idle=list(range(len(group.replicas)))) for group in scorers
        }
        self._parts: list[Batch] = []
        self._iteration = 0

    def generate(
        self,
        prompt_indices: Sequence[int],
        first_sample: int,
        samples_per_prompt: int,
        iteration: int,
        is_eval: bool = False,
    ) -> Batch:
        """Answer prompts.

        Args:
            prompt_indices: rows of the training or evaluation prompts.
            first_sample: ordinal of the first sample; episodes must not share ordinals, because
                seeds derive from them.
            samples_per_prompt: responses that each prompt gets.
            iteration: episode.
            is_eval: evaluation prompts and sampling keys.

        Returns:
            One batch; samples in the order of `prompt_indices`, those of a prompt adjacent.

        Raises:
            RankError: a rank failed, of the policy or of a scorer.
        """
        self._iteration = iteration
        share = math.ceil(len(prompt_indices) / min(len(prompt_indices), self._num_replicas))
        part: int | None = None  # the whole share in one call
        if self._scorers or (self._max_open is not None and share > self._max_open):
            part = max(1, min(share, self._max_open or share) // PARTS_PER_REPLICA)

        def arguments(given: Sequence[tuple[int, int]]) -> list[Any]:
            ordinal = given[0][1] if given else 0
            common = [[index for index, _ in given], ordinal, iteration, is_eval]
            return common if part is None else [*common, part]

        work = [
            (index, first_sample + number * samples_per_prompt)
            for number, index in enumerate(prompt_indices)
        ]
        self._answer(work, arguments, part, samples_per_prompt)
        return self._in_order(concat(self._parts))

    def generate_until(
        self, work: Sequence[Carried], num_prompts: int, samples_per_prompt: int, iteration: int,
        max_rounds: int,
    ) -> tuple[Batch, list[Carried]]:  # fmt: skip
        """Answer prompts until enough of them are answered; partial rollouts.

        Args:
            work: prompts, those first that earlier episodes have begun.
            num_prompts: how many have to be answered.
            samples_per_prompt: responses that each prompt gets.
            iteration: episode.
            max_rounds: episodes that may work on a prompt: what has been worked on in one less is
                answered now, however long that takes.

        Returns:
            * the samples of `num_prompts` prompts, the earliest first;
            * what goes on in the next episode, the earliest first.
        """
        due = {one.first_sample for one in work if one.num_rounds >= max_rounds - 1}
        missing = {one.first_sample: one for one in work}

        def is_over() -> bool:
            answered = {sample for part in self._parts for sample in part["sample_index"].tolist()}
            for sample in answered.intersection(missing):
                del missing[sample]
            return len(work) - len(missing) >= num_prompts and not due.intersection(missing)

        share = math.ceil(len(work) / self._num_replicas)
        part = max(1, min(share, self._max_open or share) // PARTS_PER_REPLICA)
        waiting = self._answer(
            work,
            lambda given: [[], 0, iteration, False, part, STEPS_PER_CALL, given],
            part,
            samples_per_prompt,
            is_over,
        )
        cut = [one for left in self._policy.call("cut") if left for one in left]
        batch = self._in_order(concat(self._parts))
        num_rows = num_prompts * samples_per_prompt
        surplus = [
            Carried(
                int(batch["prompt_index"][row]), int(batch["sample_index"][row]), 0,
                batch["begun"][row : row + samples_per_prompt],
            )
            for row in range(num_rows, batch_size(batch), samples_per_prompt)
        ]  # fmt: skip
        rounds = {one.first_sample: one.num_rounds + 1 for one in work}
        begun = [replace(one, num_rounds=rounds[one.first_sample]) for one in (*surplus, *cut)]
        batch = select(batch, range(num_rows))
        del batch["begun"]
        return batch, sorted((*begun, *waiting), key=lambda one: one.first_sample)

    @property
    def _num_replicas(self) -> int:
        return len(self._policy.replicas)

    def _answer(
        self,
        work: Sequence[Any],
        arguments: Callable[[list[Any]], list[Any]],
        part: int | None,
        samples_per_prompt: int,
        is_over: Callable[[], bool] = lambda: False,
    ) -> list[Any]:
        """Hand out work, to whoever is free, and collect the samples in `_parts`.

        Args:
            work: one entry per prompt.
            arguments: makes those of `VLLMModule.generate` of some entries.
            part: prompts that a call waits for; None: all that its replica has.
            samples_per_prompt: responses to each.
            is_over: asked after each call: whether to hand out no more.

        Returns:
            Work that nobody was asked to do.
        """
        waiting = deque(work)
        replicas = [_Replica(number) for number in range(min(self._num_replicas, len(work)))]
        share = math.ceil(len(work) / len(replicas))
        # Beyond what a replica works on it has work for two calls, so that it never waits for us.
        window = share if part is None or self._max_open is None else self._max_open + 2 * part

        def hand_out(replica: _Replica, num_prompts: int) -> None:
            given = [waiting.popleft() for _ in range(min(num_prompts, len(waiting)))]
            if not given and replica.num_open <= replica.num_calls * (part or replica.num_open):
                return  # what runs there is awaited already
            replica.num_open += len(given)
            replica.num_calls += 1
            ranks = self._policy.replicas[replica.number]
            self._pool.start(replica.number, ranks, "generate", arguments(given))

        at_once = min(len(work), window * len(replicas))
        for replica, share_of_it in zip(
            replicas, split_evenly(range(at_once), len(replicas)), strict=True
        ):
            hand_out(replica, len(share_of_it))
        for replica in replicas:
            hand_out(replica, 0)
        while any(replica.num_calls for replica in replicas):
            key, batch, reference = self._pool.next()
            if isinstance(key, tuple):
                self._note_scores(key, batch)
                continue
            replica = replicas[key]
            replica.num_calls -= 1
            if batch is not None:
                replica.num_open -= batch_size(batch) // samples_per_prompt
                self._note_part(batch, reference)
            if not is_over():
                hand_out(replica, window - replica.num_open)
        return list(waiting)

    def scores_meanwhile(self, name: str) -> bool:
        """Whether `scores` knows this scorer."""
        return name in self._scorers

    def scores(self, name: str) -> Batch:
        """Wait for what a scorer returned for all samples; in the order of the batch."""
        scorer = self._scorers[name]
        while len(scorer.scores) < len(self._parts):
            key, batch, _ = self._pool.next()
            self._note_scores(key, batch)
        scores = [scorer.scores[part] for part in range(len(self._parts))]
        sizes = [batch_size(part) for part in self._parts]
        return self._in_order(joined(name, "forward_step", scores, sizes))

    def _note_part(self, batch: Batch, reference: Any) -> None:
        self._parts.append(batch)
        for scorer in self._scorers.values():
            scorer.parts.append((len(self._parts) - 1, reference))
            self._hand_to(scorer)

    def _note_scores(self, key: tuple[str, int, int], batch: Batch | None) -> None:
        name, replica, part = key
        scorer = self._scorers[name]
        num_samples = len(self._parts[part]["sample_index"])
        scorer.scores[part] = joined(name, "forward_step", [batch], [num_samples])
        scorer.idle.append(replica)
        self._hand_to(scorer)

    def _hand_to(self, scorer: _Scorer) -> None:
        while scorer.parts and scorer.idle:
            part, reference = scorer.parts.popleft()
            replica = scorer.idle.pop(0)
            key = (scorer.group.name, replica, part)
            ranks = scorer.group.replicas[replica]
            self._pool.start(key, ranks, "forward_step", (reference, self._iteration))

    def _in_order(self, batch: Batch) -> Batch:
        """Rows of all parts in the order of the prompts."""
        samples = torch.cat([part["sample_index"] for part in self._parts])
        return select(batch, samples.argsort(stable=True))


def check_weight_version(batch: Batch, expected: int) -> None:
    """Check that every sample was made with the weights that the driver believes are in place.

    Raises:
        RuntimeError: some samples have another version.
    """
    versions = batch["weight_version"].tolist()
    wrong = sorted({version for version in versions if version != expected})
    if wrong:
        raise RuntimeError(
            f"{sum(version != expected for version in versions)} of {len(versions)} samples were "
            f"made with weight version {wrong}, the trainer's last sync was version {expected}"
        )
