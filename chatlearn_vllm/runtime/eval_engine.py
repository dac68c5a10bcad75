"""How is a policy evaluated on its own, without training?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from chatlearn_vllm.config import JobConfig
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.job.flow import FlowError, FlowFunction
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.vllm_module import VLLMModule
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.observability.metrics import MetricWriter
from chatlearn_vllm.runtime.base_engine import BaseEngine
from chatlearn_vllm.runtime.checkpoint import DriverState
from chatlearn_vllm.runtime.evaluator import Evaluator
from chatlearn_vllm.runtime.memory import ScorerMemory

logger = get_logger(__name__)

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")


class EvalEngine(BaseEngine):
    """Answers prompts with a policy that loads its own weights, and scores the answers.

    Example:
        def eval_flow(prompts):
            return reward.eval_forward(policy.eval_forward(prompts))

        metrics = EvalEngine(eval_flow).set_dataset(prompts).eval()
    """

    def __init__(
        self, eval_flow: FlowFunction | None = None, evaluator: Evaluator | None = None
    ) -> None:
        """Say what is done; one of the two.

        The policy's weights are those of its `load`: where `load_format` is dummy, which waits for
        a weight sync, it becomes auto.

        Args:
            eval_flow: calls `eval_forward` of a policy on its argument and of others on the
                policy's samples; see docs/flows.md.
            evaluator: with such a flow; of a class that overrides `post_process_func`, for example.

        Raises:
            FlowError: neither or both are given, or the flow cannot be an evaluation.
            UserError: the policy has no weights to load.
        """
        if (eval_flow is None) == (evaluator is None):
            raise FlowError("EvalEngine takes a flow or an evaluator, one of the two")
        evaluator = evaluator or Evaluator(eval_flow)
        policy = evaluator.policy
        # The policy comes last: vLLM sizes its KV cache by what the others left free.
        super().__init__(*(one for one in evaluator.modules if one is not policy), policy)
        self.job = _loading_weights(self.job, policy)
        self.set_evaluator(evaluator)
        self._memory: dict[str, ScorerMemory] = {}

    def set_dataset(self, prompts: Sequence[Any]) -> Self:
        """Say what is asked; without it, `runtime.eval_data_path` is read.

        Args:
            prompts: strings, or dicts as read from a jsonl file by `load_prompts`.

        Returns:
            This engine.

        Raises:
            UserError: there is no prompt.
        """
        self.evaluator.set_dataset(prompts)
        return self

    def eval(self, cur_iter: int = 0, train_iteration: int = 0) -> dict[str, float]:
        """Run the whole job.

        Args:
            cur_iter: episodes that the weights have been trained for; names the files
                `eval/episode_<cur_iter>.jsonl` and `.txt`, and the line in `eval/metrics.jsonl`.
            train_iteration: optimizer steps that they have been trained for.

        Returns:
            The metrics, as in that line.

        Raises:
            RankError: a rank failed; every process of the job has ended when it arrives.
        """
        with self.running(), self.timers.phase("eval"):
            metrics = self.evaluator.evaluate(
                self.groups, cur_iter, self.run_dir, self.in_memory, train_iteration
            )
        metrics["time/eval_s"] = self.timers.take()["eval"]
        with MetricWriter(self.run_dir / "eval", cur_iter, tensorboard=False) as writer:
            writer.write(cur_iter, metrics)
        return metrics

    def learn(self) -> list[dict[str, float]]:
        """There is nothing to learn: evaluates once, see `eval`."""
        return [{"episode": 0, **self.eval()}]

    def setup(self) -> None:
        """Start the ranks and build the models."""
        self.start_models()

    def model_is_built(self, module: BaseModule) -> None:
        """Keep a model that shares the policy's devices off them until it scores."""
        if module is not self.evaluator.policy:
            memory = ScorerMemory(
                self.groups[module.name], module.module_args, self.shares_devices(module)
            )
            self._memory[module.name] = memory
            memory.offload()

    @contextmanager
    def in_memory(self, module: BaseModule) -> Iterator[None]:
        """Within the block a model that scores is on its device."""
        self._memory[module.name].onload()
        yield
        self._memory[module.name].offload()

    def run_episode(self, episode: int) -> dict[str, float]:
        """Evaluate, while the models run."""
        return self.evaluator.evaluate(self.groups, episode, self.run_dir, self.in_memory)

    def save_all(self, state: DriverState) -> None:
        """Nothing is trained, so nothing is saved."""


def _loading_weights(job: JobConfig, policy: BaseModule) -> JobConfig:
    """The job, in which vLLM loads the policy's weights when its engine is built."""
    args = policy.model_args
    if not isinstance(policy, VLLMModule):
        return job
    if args.load is None or not any(
        found for pattern in WEIGHT_FILES for found in Path(args.load).glob(pattern)
    ):
        raise UserError(
            f"models.{policy.name}: load={args.load} must be a Hugging Face directory with weights "
            f"({', '.join(WEIGHT_FILES)}): in an evaluation no trainer sends any"
        )
    if args.load_format != "dummy":
        return job
    logger.info("%s: load_format: dummy becomes auto, no weight sync comes", policy.name)
    model = policy.module_args.model_copy(
        update={"model_args": args.model_copy(update={"load_format": "auto"})}
    )
    return job.model_copy(update={"models": {**job.models, policy.name: model}})
