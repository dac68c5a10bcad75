"""What does the framework call on a model role, and when?"""

from __future__ import annotations

import os
from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar

from chatlearn_vllm.job.flow import records_calls

if TYPE_CHECKING:
    from chatlearn_vllm.config import JobConfig, ModelArgs, ModelConfig, RuntimeConfig


@records_calls
class BaseModule(ABC):
    """One role of a job (policy, reference, reward, policy_trainer, …), by its name in the yaml.

    The driver makes one instance per role to say which class plays it. Each rank of the role then
    makes its own instance in its own process, and the framework calls on every rank, in order:
    `preload`, `init`, `model_setup`, `validate`, and per episode `before_episode`, the role's work
    (`forward_step`, or what a subclass adds), `after_episode`. Colocated roles are asked to give
    their device memory back with `offload` and to take it with `onload`.

    On the driver, in the function of a flow (see job/flow.py), `forward_step`, `eval_forward` and
    `train_step` get handles in place of data and only note the call.
    """

    gpu_environment: ClassVar[dict[str, str]] = {}
    """Variables that the processes of ranks with a GPU start with, for the role's libraries."""
    reads_policy_tokens: ClassVar[bool] = True
    """Whether a role on megatron-core takes the policy's token ids as they are: its vocabulary must
    then be the policy's. False for a class that tokenizes the texts itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        records_calls(cls)

    def __init__(self, name: str, job: JobConfig | None = None, replica_id: int = 0) -> None:
        """Keep the job description; cheap, so that the driver can do it without a device.

        Args:
            name: key of this role under `models` in the yaml.
            job: the checked job; None takes the job of `chatlearn_vllm.init()`.
            replica_id: which data parallel copy of the role this instance belongs to.

        Raises:
            ValueError: the job has no model of this name, or `init()` was not called.
        """
        if job is None:
            from chatlearn_vllm.runtime.session import current_job

            job = current_job()
        if name not in job.models:
            raise ValueError(
                f"{type(self).__name__}({name!r}): {job.path} has no models.{name}; "
                f"it has {', '.join(job.models)}"
            )
        self.name = name
        self.job = job
        self.replica_id = replica_id
        self._storage: dict[str, Any] = {}

    @property
    def runtime_args(self) -> RuntimeConfig:
        """The `runtime` section of the yaml."""
        return self.job.runtime

    @property
    def module_args(self) -> ModelConfig:
        """This role's entry under `models` in the yaml."""
        return self.job.models[self.name]

    @property
    def model_args(self) -> ModelArgs:
        """What `model_config_file` says, with defaults; a mapping."""
        return self.module_args.model_args

    @property
    def rank(self) -> int:
        """Rank inside the replica."""
        return int(os.environ.get("RANK", "0"))

    @property
    def world_size(self) -> int:
        """Number of ranks of the replica."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def data_parallel_rank(self) -> int:
        """Which shard of a training batch this rank works on."""
        return 0

    @property
    def data_parallel_size(self) -> int:
        """Number of shards of a training batch inside one replica."""
        return 1

    def is_last_rank(self) -> bool:
        """Whether this is the replica's last rank."""
        return self.rank == self.world_size - 1

    def preload(self) -> None:
        """Import what `model_setup` needs: all models at once, before the first is set up."""

    def init(self) -> None:
        """Join the replica's process group. All ranks; once, before `model_setup`."""

    def setup(self) -> None:
        """User hook: build what the role needs. All ranks; called by `model_setup`."""

    def model_setup(self) -> None:
        """Build the model. All ranks; once."""
        self.setup()

    def validate(self) -> None:
        """User hook: check the built role. All ranks; once, after `model_setup`."""

    def before_episode(self) -> None:
        """User hook. All ranks; at the start of each episode."""

    def after_episode(self) -> None:
        """User hook. All ranks; at the end of each episode."""

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> Any:
        """The role's inference on a batch; see the subclass for shapes."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_step")

    def eval_forward(self, data: dict[str, Any], iteration: int = 0) -> Any:
        """Like `forward_step`, for evaluation; the same unless overridden."""
        return self.forward_step(data, iteration)

    def train_step(self, data: Any, iteration: int = 0) -> Any:
        """One optimizer step of a role that is trained; see the subclass.

        In a flow: train on the whole batch, as the `runtime` section says.
        """
        raise NotImplementedError(f"{type(self).__name__} has no train_step")

    def onload(self) -> None:
        """Take device memory back. All ranks."""

    def offload(self) -> None:
        """Give device memory to a colocated role. All ranks."""

    def memory_keys(self) -> list[str]:
        """Changes of this role's yaml that make it need less device memory, most useful first.

        Each is a key and its new value, relative to `models.NAME`; shown when memory runs out.
        """
        return []

    def save_checkpoint(self, iteration: int) -> None:
        """Save what resuming after episode `iteration` needs. All ranks."""

    def shutdown(self) -> None:
        """Release what outlives the process. All ranks; at the end of the job."""

    def put(self, key: str, data: Any) -> None:
        """Keep a value on this rank for a later call."""
        self._storage[key] = data

    def get(self, key: str) -> Any:
        """A value kept by `put`."""
        return self._storage[key]
