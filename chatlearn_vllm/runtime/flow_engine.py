"""What happens in an episode whose samples and training a user's flows describe?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

from chatlearn_vllm.config import RuntimeConfig
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.job.flow import Call, FlowError, FlowFunction, record
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.preference_module import PreferenceModule
from chatlearn_vllm.modules.reward_module import RewardModule
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime.evaluator import Evaluator
from chatlearn_vllm.runtime.flow_steps import call_function, merged, policy_call, run_flow
from chatlearn_vllm.runtime.rollout_engine import RolloutEngine

logger = get_logger(__name__)


@runtime_checkable
class TakesWeights(Protocol):
    """What a weight sync can fill; `VLLMModule` and `WeightTargetModule` are."""

    def import_weights(self, source_ranks: tuple[int, ...], keep_open: bool) -> None:
        """See `VLLMModule.import_weights`."""


class Environment:
    """The flow that makes an episode's training data of prompts."""

    def __init__(self, flow: FlowFunction) -> None:
        """Record the flow.

        Args:
            flow: takes the handle of the prompts; calls `forward_step` of a policy on it, of other
                models on the samples, and `apply`; returns the handle, or handles, of what is
                trained on.

        Raises:
            FlowError: the function is no flow, or does what this one cannot do.
        """
        self.flow = record(flow)
        self.flow.require_methods("forward_step")
        self.policy_call = policy_call(self.flow, "forward_step")
        self.flow.require_result()

    @property
    def policy(self) -> BaseModule:
        """Who answers the prompts."""
        return self.policy_call.module


class Trainer:
    """The flow that says which models are trained on the batch that an Environment returns."""

    def __init__(self, flow: FlowFunction) -> None:
        """Record the flow.

        Args:
            flow: takes the handle of the batch and calls `train_step` of each model that is trained
                on it.

        Raises:
            FlowError: the function is no flow, or does what this one cannot do.
        """
        self.flow = record(flow)
        self.flow.require_methods("train_step")
        if not self.flow.calls:
            raise FlowError(f"{self.flow.name} trains no model: policy_trainer.train_step(batch)")
        for call in self.flow.calls:
            if call.module is None or len(call.inputs) > 1 or call.inputs[0].call is not None:
                raise FlowError(
                    f"{self.flow.name}: {call} is not train_step on the flow's argument alone; "
                    "what else is made of the batch belongs into the flow of the Environment"
                )
        if len(self.flow.modules) < len(self.flow.calls):
            raise FlowError(
                f"{self.flow.name} trains a model twice; several passes over an episode's data are "
                "runtime.num_training_epoch"
            )
        for module in self.models:
            if not module.module_args.trainable:
                raise FlowError(
                    f"{self.flow.name} trains models.{module.name}: set its trainable: True"
                )
            if isinstance(module, PreferenceModule | RewardModule):
                raise FlowError(
                    f"{self.flow.name} trains models.{module.name}, a {type(module).__name__}: its "
                    "rows come in pairs that have to stay together; use OnlineDPOEngine or "
                    "RewardEngine"
                )

    @property
    def models(self) -> tuple[BaseModule, ...]:
        """What is trained, in order."""
        return self.flow.modules


class Engine(RolloutEngine):
    """Runs episodes of any flow; see docs/flows.md.

    Of an episode the flows say what comes between prompts and training. Memory of colocated models,
    weight sync, checkpoints, evaluation and metrics are those of every engine.

    Example:
        engine = Engine(Environment(env_flow), Trainer(trainer_flow), Evaluator(eval_flow))
        engine.set_parameter_sync(policy_trainer, policy)
        engine.set_dataset(prompts)
        engine.learn()
    """

    def __init__(
        self, environment: Environment, trainer: Trainer, evaluator: Evaluator | None = None
    ) -> None:
        """Derive who plays which role.

        The policy is who answers the prompts; all other models of the flows are trained or frozen.
        Models are trained in the order of the trainer's flow, but the one whose weights go to the
        policy is the last: with them the policy comes back into memory.

        Args:
            environment: makes the training data.
            trainer: says what is trained on it.
            evaluator: evaluates as the yaml says when; may call models that no other flow calls.

        Raises:
            FlowError: something else is given, or the flows are of different jobs.
            UserError: keys of the yaml do not fit together, or not to flows.
        """
        kinds = (environment, Environment), (trainer, Trainer), (evaluator, Evaluator | None)
        for given, kind in kinds:
            if not isinstance(given, kind):
                raise FlowError(
                    "Engine(Environment(env_flow), Trainer(trainer_flow), Evaluator(eval_flow)) "
                    f"takes flows in this form and order, got a {type(given).__name__}"
                )
        self.environment, self.trainer = environment, trainer
        flows = [environment.flow, trainer.flow] + ([evaluator.flow] if evaluator else [])
        modules = tuple(dict.fromkeys(module for flow in flows for module in flow.modules))
        for module in modules:
            if module.job is not environment.policy.job:
                raise FlowError(
                    f"models.{module.name} is of the job {module.job.path}, the policy of another "
                    f"one, {environment.policy.job.path}; make all modules after one init()"
                )
        trained = trainer.models
        frozen = [one for one in modules if one not in trained and one is not environment.policy]
        _check_keys(frozen, environment.policy.runtime_args)
        self._pairs: dict[BaseModule, BaseModule] = {}
        super().__init__(
            environment.policy,
            None,
            trained[-1],  # until `setup` knows whose weights the policy gets
            scorers=frozen,
            trained=dict.fromkeys(trained[:-1]),
        )
        if evaluator is not None:
            self.set_evaluator(evaluator)

    def set_parameter_sync(self, source: BaseModule, target: BaseModule) -> Self:
        """Say that after training the weights of `source` go to `target`.

        With one trained model and no such call, they go to the policy.

        Args:
            source: a model of the trainer's flow.
            target: the policy, or a frozen model that scores (a `WeightTargetModule`).

        Returns:
            This engine.

        Raises:
            UserError: they are not, or have a partner already.
        """
        pair = f"set_parameter_sync(models.{source.name}, models.{target.name})"
        trained = self.trainer.models
        if source not in trained:
            names = ", ".join(one.name for one in trained)
            raise UserError(f"{pair}: {self.trainer.flow.name} trains {names}, not {source.name}")
        if target not in self.modules or target in trained:
            raise UserError(f"{pair}: models.{target.name} is no frozen model of the flows")
        if not isinstance(target, TakesWeights):
            raise UserError(
                f"{pair}: {type(target).__name__} takes no weights; the target is a VLLMModule or "
                "a WeightTargetModule such as ValueModule"
            )
        for known_source, known_target in self._pairs.items():
            if source is known_source or target is known_target:
                raise UserError(
                    f"{pair}: models.{known_source.name} and models.{known_target.name} are a pair "
                    "already; each model has one partner"
                )
        self._pairs[source] = target
        return self

    # ---- set-up -----------------------------------------------------------------------------

    def setup(self) -> None:
        """Settle whose weights go where, then start and build everything.

        Raises:
            UserError: it is in doubt; nothing is started then.
        """
        self._settle_targets()
        super().check_policy_and_trainer()
        super().setup()

    def check_policy_and_trainer(self) -> None:
        """Not before `setup`, which knows whose weights the policy gets."""

    def _settle_targets(self) -> None:
        trained, pairs = self.trainer.models, dict(self._pairs)
        if len(trained) == 1 and not pairs:
            pairs = {trained[0]: self.policy}
        sources = {target: source for source, target in pairs.items()}
        if self.policy not in sources:
            names = " or ".join(one.name for one in trained)
            raise UserError(
                f"whose weights does models.{self.policy.name} get, those of {names}? Call "
                f"engine.set_parameter_sync(TRAINER, {self.policy.name}) before learn()"
            )
        for module in trained:
            if module not in pairs and module not in self.environment.flow.modules:
                raise UserError(
                    f"models.{module.name} is trained, but nobody gets its weights: call "
                    f"engine.set_parameter_sync({module.name}, TARGET), or let it score in "
                    f"{self.environment.flow.name} itself"
                )
        self.policy_trainer = sources[self.policy]
        others = [one for one in trained if one is not self.policy_trainer]
        self._targets = {one: pairs.get(one) for one in others} | {self.policy_trainer: self.policy}

    # ---- the episode ------------------------------------------------------------------------

    def collect(self, episode: int) -> tuple[Batch, dict[str, float]]:
        """What the environment's flow makes of the next prompts, with its metrics.

        The metrics of rollout and rewards are those of all the policy's samples, with the rewards
        of the last call whose result still has all of them.
        """
        flow = self.environment.flow
        metrics: dict[str, float] = {}

        def run_call(call: Call, inputs: Batch) -> Batch:
            if call is self.environment.policy_call:
                samples = self.roll_out(episode)
                with self.timers.phase("offload"):
                    self._memory[self.policy.name].offload()
                return samples
            if call.module is not None:
                with self.timers.phase(call.module.name):
                    return self._score(call.module, inputs, episode)
            with self.timers.phase("apply"):
                columns, found = call_function(flow, call, inputs)
            metrics.update(found)
            return columns

        results = run_flow(flow, run_call)
        samples = results[self.environment.policy_call]
        for result in results.values():
            if "rewards" in result and batch_size(result) == batch_size(samples):
                samples = result
        batch = merged(flow, "the returned handles", flow.returned, results)
        return batch, self.sample_metrics(samples) | metrics

    def scorers_of_all_samples(self) -> Sequence[BaseModule]:
        """Frozen models that are called once, on the policy's samples as they are."""
        calls = [call for call in self.environment.flow.calls if call.module is not None]
        samples = self.environment.policy_call
        return [
            call.module
            for call in calls
            if {one.call for one in call.inputs} == {samples}
            and [other.module for other in calls].count(call.module) == 1
            and call.module not in self._targets
        ]

    def prepare(self, batch: Batch, episode: int) -> tuple[Batch, dict[str, float]]:
        """The batch as it is: the flow has made it."""
        if not batch_size(batch):
            logger.warning(
                "episode %d: %s left no rows to train on", episode, self.environment.flow.name
            )
        return batch, {}

    def _score(self, module: BaseModule, batch: Batch, episode: int) -> Batch:
        if module not in self._targets:
            return self.forward(module, batch, episode)
        memory = self._memory[module.name]
        memory.onload("weights")
        scores = self.groups[module.name].forward_sharded("forward_step", batch, episode)
        memory.offload("weights")
        return scores


def _check_keys(frozen: Sequence[BaseModule], runtime: RuntimeConfig) -> None:
    """Refuse keys that only engines with roles of their own follow."""
    if runtime.dynamic_sampling:
        raise UserError(
            "runtime.dynamic_sampling has no effect in a flow; leave it out and choose rows in a "
            "function given to apply, or use GRPOEngine"
        )
    for module in frozen:
        weight = module.module_args.reward_weight
        if weight != 1:
            raise UserError(
                f"models.{module.name}: reward_weight={weight} has no effect in a flow; leave it "
                "out and multiply in a function given to apply"
            )
