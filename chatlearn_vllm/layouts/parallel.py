"""Which part of the model does a rank hold: coordinates of ranks and layers of pipeline stages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainRank:
    """Coordinates of a training rank."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class TrainParallel:
    """How megatron-core spreads a model over its ranks (order tp-cp-ep-dp-pp, no context parallel).

    Raises:
        ValueError: the sizes contradict each other.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Number of model chunks per pipeline stage."""
    expert: int = 1
    """Expert model parallel size."""
    expert_tensor: int | None = None
    """Expert tensor parallel size; None for the tensor parallel size."""
    first_stage_layers: int | None = None
    """num_layers_in_first_pipeline_stage."""
    last_stage_layers: int | None = None
    """num_layers_in_last_pipeline_stage."""

    def __post_init__(self) -> None:
        dense = self.tensor * self.pipeline
        expert = self.expert * self.etp * self.pipeline
        for size, what in ((dense, "tp x pp"), (expert, "ep x etp x pp")):
            if self.world_size % size:
                raise ValueError(
                    f"{self.world_size} training ranks are not a multiple of {what} = {size}"
                )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual pipeline stages need a pipeline parallel size above 1")

    @property
    def etp(self) -> int:
        """Expert tensor parallel size."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one pipeline stage, data parallel copies included."""
        return self.world_size // self.pipeline

    def coordinates(self, rank: int) -> TrainRank:
        """Where a rank of the world stands."""
        stage, within = divmod(rank, self.ranks_per_stage)
        return TrainRank(
            within % self.tensor, stage, within // self.etp % self.expert, within % self.etp
        )

    def dense_ranks(self, stage: int, tensor: int) -> tuple[int, ...]:
        """Ranks that hold the same dense shard: the data parallel copies."""
        first = stage * self.ranks_per_stage
        return tuple(range(first + tensor, first + self.ranks_per_stage, self.tensor))

    def expert_ranks(self, stage: int, expert: int, expert_tensor: int) -> tuple[int, ...]:
        """Ranks that hold the same expert shard: the expert data parallel copies."""
        first = stage * self.ranks_per_stage
        start = first + expert * self.etp + expert_tensor
        return tuple(range(start, first + self.ranks_per_stage, self.expert * self.etp))

    def chunks(self, num_layers: int) -> list[list[range]]:
        """Layers of each model chunk: [stage][virtual stage].

        Raises:
            ValueError: the layers cannot be spread so.
        """
        first, last = self.first_stage_layers, self.last_stage_layers
        middle = num_layers - (first or 0) - (last or 0)
        num_middle = self.pipeline - (first is not None) - (last is not None)
        is_possible = num_middle == 0 == middle
        if num_middle > 0:
            is_possible = middle >= 0 and middle % num_middle == 0
        if not is_possible:
            raise ValueError(
                f"{num_layers} layers cannot be spread over {self.pipeline} pipeline stages"
                + (f" with {first} in the first" if first is not None else "")
                + (f" and {last} in the last" if last is not None else "")
            )
        counts = [middle // num_middle if num_middle else 0] * self.pipeline
        if first is not None:
            counts[0] = first
        if last is not None:
            counts[-1] = last
        for count in counts:
            if count % self.virtual_pipeline:
                raise ValueError(
                    f"{count} layers of a pipeline stage cannot be spread over "
                    f"{self.virtual_pipeline} virtual stages"
                )
        chunks: list[list[range]] = [[] for _ in range(self.pipeline)]
        at = 0
        for _ in range(self.virtual_pipeline):
            for stage, count in enumerate(counts):
                size = count // self.virtual_pipeline
                chunks[stage].append(range(at, at + size))
                at += size
        return chunks


@dataclass(frozen=True)
class RolloutRank:
    """Coordinates of a rollout rank."""

    replica: int
    tensor: int
    pipeline: int


@dataclass(frozen=True)
class RolloutParallel:
    """How replicas of a vLLM engine spread a model over their ranks."""

    tensor: int = 1
    pipeline: int = 1
    expert: bool = False
    """vLLM's enable_expert_parallel: whole experts spread over the tensor parallel ranks."""
    replicas: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of all replicas."""
        return self.replicas * self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        """Ranks of one engine."""
        return self.tensor * self.pipeline

    def coordinates(self, rank: int) -> RolloutRank:
        """Where a rank, counted over all replicas, stands."""
        replica, within = divmod(rank, self.ranks_per_replica)
        return RolloutRank(replica, within % self.tensor, within // self.tensor)

    def dense_ranks(self, stage: int, tensor: int) -> tuple[int, ...]:
        """Ranks that hold the same shard: one per replica."""
        first = stage * self.tensor + tensor
        return tuple(range(first, self.world_size, self.ranks_per_replica))

    def stages(self, num_layers: int) -> list[range]:
        """Layers of each pipeline stage: what is left over goes to the last but one and before."""
        counts = [num_layers // self.pipeline] * self.pipeline
        for number in range(2, num_layers % self.pipeline + 2):
            counts[-number] += 1
        starts = [sum(counts[:stage]) for stage in range(self.pipeline)]
        return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
