"""What happens in one episode of training a reward model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.data.preferences import preference_pairs
from chatlearn_vllm.data.prompts import load_prompts
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.pairs import check_room_for_pairs
from chatlearn_vllm.runtime.record_engine import RecordEngine


class RewardEngine(RecordEngine):
    """Trains a reward model on pairs of a better and a worse response.

    Records are of any form that `preference_pairs` reads; `sample_per_episode` and
    `train_global_batch_size` count pairs. Pairs that are not trained on, `runtime.eval_data_path`,
    are compared every `eval_episode_interval` episodes and after the last one. The module has
    `train_records`, see `RecordEngine`, and `compare(data, iteration)`: it gets `{"pairs": ...}`, a
    list of B dicts with `prompt`, `chosen` and `rejected`, and returns `chosen_rewards` and
    `rejected_rewards` [B].

    Example:
        engine = RewardEngine(reward_trainer)
        engine.set_dataset(load_prompts("pairs.jsonl"))
        engine.learn()
    """

    def __init__(self, reward_trainer: BaseModule) -> None:
        """Say what is trained.

        Args:
            reward_trainer: a `RewardModule` with the two methods above.

        Raises:
            UserError: keys of the yaml do not fit together.
        """
        check_room_for_pairs(reward_trainer)
        super().__init__(reward_trainer)
        self._eval_pairs: Sequence[Any] | None = None

    def set_eval_dataset(self, records: Sequence[Any]) -> None:
        """Say what to evaluate on; without it, `runtime.eval_data_path` is read."""
        self._eval_pairs = preference_pairs(records)

    def read_records(self, records: Sequence[Any]) -> Sequence[Any]:
        """See `preference_pairs`."""
        pairs = preference_pairs(records)
        if not pairs:
            raise UserError("no training data: no record has a better and a worse response")
        return pairs

    def setup(self) -> None:
        """See `RecordEngine.setup`; also reads what to evaluate on."""
        path, limit = self.args.eval_data_path, self.args.eval_data_num_limit
        if self._eval_pairs is None and path is not None:
            self.set_eval_dataset(load_prompts(path, limit))
        super().setup()

    def before_episodes(self) -> dict[str, float]:
        """Evaluate before training, if the yaml says so."""
        is_due = self.args.enable_eval_before_training and self.finished_episodes == 0
        return self._evaluate(0) if is_due else {}

    def run_episode(self, episode: int) -> dict[str, float]:
        """Draw pairs, learn them, save and evaluate if due."""
        metrics = super().run_episode(episode)
        interval = self.args.eval_episode_interval
        if interval and (episode % interval == 0 or episode == self.args.num_episode):
            metrics |= self._evaluate(episode)
        return metrics

    def _evaluate(self, episode: int) -> dict[str, float]:
        """Share of the evaluation's pairs whose better response gets the higher reward."""
        pairs = list(self._eval_pairs or ())
        if not pairs:
            return {}
        # All data parallel ranks get equally many.
        unit = self.trainer.module_args.data_parallel_size
        filled = (pairs * unit)[: -(-len(pairs) // unit) * unit]
        with self.timers.phase("evaluate"):
            scored = self.groups[self.trainer.name].forward_sharded(
                "compare", {"pairs": filled}, episode
            )
        rewards = scored["chosen_rewards"], scored["rejected_rewards"]
        margin = (rewards[0] - rewards[1])[: len(pairs)].float()
        return {
            "eval/accuracy": (margin > 0).float().mean().item(),
            "eval/reward_margin": margin.mean().item(),
            "eval/num_pairs": len(pairs),
        }
