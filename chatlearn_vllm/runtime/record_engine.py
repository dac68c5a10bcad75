"""What happens in one episode of training on given records?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatlearn_vllm.config import RuntimeConfig, UserError
from chatlearn_vllm.data.balance import balanced
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.runtime.base_engine import BaseEngine
from chatlearn_vllm.runtime.checkpoint import DriverState
from chatlearn_vllm.runtime.episode_metrics import train_metrics
from chatlearn_vllm.runtime.role_keys import tell_unread_keys
from chatlearn_vllm.runtime.scatter import train_rows

_OF_ROLLOUTS = {"dynamic_sampling": False, "max_rollout_round": 1, "max_relay_episode": 0}
"""Keys that say how responses are gathered, and what they are otherwise."""


class RecordEngine(BaseEngine):
    """Trains one model on records that are there before the job starts.

    Per episode, `sample_per_episode` records are spread over the data parallel ranks, by their
    lengths, whose `train_records(records, iteration)` tokenizes and learns them; it returns one
    dict of numbers per optimizer step, as `train` does.
    """

    def __init__(self, trainer: BaseModule) -> None:
        super().__init__(trainer)
        _check_keys(type(self).__name__, self.args)
        tell_unread_keys([trainer])
        self.trainer = trainer
        # Fails here, before anything starts, if the batch sizes do not fit together.
        train_rows(
            self.args.sample_per_episode,
            self.args.train_global_batch_size,
            data_parallel_rank=0,
            data_parallel_size=trainer.module_args.data_parallel_size,
        )

    def read_records(self, records: Sequence[Any]) -> Sequence[Any]:
        """Check the records, before anything starts, and bring them into one form."""
        return records

    def setup(self) -> None:
        """See `BaseEngine.setup`; also remembers the records."""
        self.records = self.read_records(self._training_records())
        self.set_dataset(self.records)
        super().setup()

    def run_episode(self, episode: int) -> dict[str, float]:
        """Draw records, learn them, save if due."""
        group = self.groups[self.trainer.name]
        drawn = [self.records[row] for row in self.sampler.next(self.args.sample_per_episode)]
        lengths = [num_characters(record) for record in drawn]
        with self.timers.phase("train"):
            stats = group.call_sharded(
                "train_records",
                lambda rank, size: [
                    drawn[row]
                    for row in balanced(lengths, size, self.args.train_global_batch_size)[rank]
                ],
                episode,
            )
        self.save_if_due(group, episode)
        return train_metrics(stats)

    def save_all(self, state: DriverState) -> None:
        """Save the model that is trained."""
        self.save(self.groups[self.trainer.name], state.episode, state=state)


def _check_keys(engine: str, runtime: RuntimeConfig) -> None:
    """Refuse keys of rollouts: steps of a schedule are counted by some of them."""
    values = {name: getattr(runtime, name) for name in _OF_ROLLOUTS}
    given = {name: value for name, value in values.items() if value != _OF_ROLLOUTS[name]}
    given |= {f"mismatch_stop.{name}": v for name, v in runtime.mismatch_stop.set_levels().items()}
    if given:
        keys = ", ".join(f"runtime.{name}={value}" for name, value in given.items())
        raise UserError(f"{keys}: no effect in {engine}, which generates nothing; leave it out")


def num_characters(record: Any) -> int:
    """Length of a record's texts: about proportional to its tokens, which only ranks can count."""
    texts = record.values() if isinstance(record, dict) else [record]
    return sum(len(text) for text in texts if isinstance(text, str))
