"""What happens in one episode of supervised fine-tuning?"""

from __future__ import annotations

from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.runtime.base_engine import BaseEngine
from chatlearn_vllm.runtime.episode_metrics import train_metrics
from chatlearn_vllm.runtime.scatter import train_rows


class SFTEngine(BaseEngine):
    """Trains a model on given responses.

    Records are dicts with `prompt` and `response`. Per episode, `sample_per_episode` of them are
    spread over the data parallel ranks, whose `train_records(records, iteration)` tokenizes and
    learns them; it returns one dict of numbers per optimizer step, as `train` does.

    Example:
        engine = SFTEngine(policy_trainer)
        engine.set_dataset(load_prompts("sft.jsonl"))
        engine.learn()
    """

    def __init__(self, policy_trainer: BaseModule) -> None:
        super().__init__(policy_trainer)
        self.policy_trainer = policy_trainer
        # Fails here, before anything starts, if the batch sizes do not fit together.
        train_rows(
            self.args.sample_per_episode,
            self.args.train_global_batch_size,
            data_parallel_rank=0,
            data_parallel_size=policy_trainer.module_args.data_parallel_size,
        )

    def setup(self) -> None:
        """See `BaseEngine.setup`; also remembers the records."""
        self.records = self._training_records()
        super().setup()

    def run_episode(self, episode: int) -> dict[str, float]:
        """Draw records, learn them, save if due."""
        trainer = self.groups[self.policy_trainer.name]
        drawn = [self.records[row] for row in self.sampler.next(self.args.sample_per_episode)]
        with self.timers.phase("train"):
            stats = trainer.call_sharded(
                "train_records",
                lambda rank, size: [
                    drawn[row]
                    for row in train_rows(len(drawn), self.args.train_global_batch_size, rank, size)
                ],
                episode,
            )
        self.save_if_due(trainer, episode)
        return train_metrics(stats)

    def save_all(self, episode: int) -> None:
        """Save the model that is trained."""
        self.save(self.groups[self.policy_trainer.name], episode)
