"""Which ranks hold which part of a logical tensor? The same question for either side."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from chatlearn_vllm.layouts.blocks import Block, ParamLayout
from chatlearn_vllm.layouts.families import LayerParam
from chatlearn_vllm.layouts.model import ModelShape, layer_and_expert
from chatlearn_vllm.layouts.parallel import RolloutParallel, TrainParallel


class Holder(NamedTuple):
    """A block of a logical tensor and the ranks that hold it, each the same."""

    ranks: tuple[int, ...]
    param: str
    """Name of the local parameter."""
    block: Block


@dataclass(frozen=True)
class LowRank:
    """Adapters beside some weights: the weight in use is W + scale * B @ A."""

    r: int
    """Columns of B [out, r], rows of A [r, in]."""
    scale: float
    modules: frozenset[str]
    """Last names of the modules whose `weight` has an adapter."""

    def adapts(self, param: str) -> bool:
        """Whether a parameter has an adapter."""
        module, _, kind = param.rpartition(".")
        return kind == "weight" and module.rpartition(".")[2] in self.modules


class ShardedModel(ABC):
    """A model spread over ranks; knows each rank's parameters and the holders of each tensor.

    Everything follows from sizes: nothing is gathered, so a plan for a few of a thousand ranks
    costs what these few hold.
    """

    low_rank: LowRank | None = None
    """Adapters of this side; their parts lie with the parts of the weights."""

    @property
    @abstractmethod
    def num_ranks(self) -> int:
        """Number of ranks, copies of the model included."""

    @abstractmethod
    def rank_layouts(self, rank: int) -> list[ParamLayout]:
        """All parameters of a rank."""

    @abstractmethod
    def holders(self, tensor: str) -> Sequence[Holder]:
        """Who holds a logical tensor, or a part of it; empty where nobody does."""

    @property
    def num_batches(self) -> int:
        """A sync fills the parameters of a rank in so many batches, one after the other."""
        return 1

    def batch_of(self, param: str) -> int:
        """The batch in which a sync fills a parameter."""
        return 0


class LayeredShards(ShardedModel):
    """A model whose holders follow from sizes, found layer by layer and expert by expert."""

    def __init__(self, model: ModelShape) -> None:
        self.model = model
        self._found: dict[tuple[int | None, int | None], dict[str, list[Holder]]] = {}

    def holders(self, tensor: str) -> Sequence[Holder]:
        """See ShardedModel."""
        layer, expert = place = layer_and_expert(tensor)
        if place not in self._found:
            self._found[place] = self._find_holders(layer, expert)
        return self._found[place].get(tensor, ())

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: the sizes."""
        return self.__dict__ | {"_found": {}}

    def __eq__(self, other: object) -> bool:
        """Whether the sizes are the same."""
        return type(self) is type(other) and self.__getstate__() == other.__getstate__()

    __hash__ = None

    def _find_holders(self, layer: int | None, expert: int | None) -> dict[str, list[Holder]]:
        if layer is None:
            return self._outer_holders()
        if layer >= self.model.num_layers:
            return {}
        if expert is None:
            return self._layer_holders(layer)
        if self.model.experts_of(layer) is None or expert >= self.model.num_experts:
            return {}
        return self._expert_holders(layer, expert)

    @abstractmethod
    def _outer_holders(self) -> dict[str, list[Holder]]:
        """Of the tensors that are in no layer."""

    @abstractmethod
    def _layer_holders(self, layer: int) -> dict[str, list[Holder]]:
        """Of a layer's tensors but its experts'."""

    @abstractmethod
    def _expert_holders(self, layer: int, expert: int) -> dict[str, list[Holder]]:
        """Of one expert's tensors."""


class CutShards(LayeredShards):
    """A model whose layers lie on pipeline stages and are cut over tensor parallel ranks."""

    parallel: TrainParallel | RolloutParallel
    _stage_of: dict[int, int]
    """Pipeline stage of each layer."""

    @abstractmethod
    def _layer_param(self, layer: int, param: LayerParam, tp_rank: int) -> ParamLayout:
        """One parameter of a layer on one tensor parallel rank."""

    def _layer(self, layer: int, tp_rank: int) -> Iterator[ParamLayout]:
        """A layer's parameters but its experts'."""
        for param in self.model.layer_params(layer):
            yield self._layer_param(layer, param, tp_rank)

    def _layer_holders(self, layer: int) -> dict[str, list[Holder]]:
        stage = self._stage_of[layer]
        return group_holders(
            (self.parallel.dense_ranks(stage, tp_rank), layout)
            for tp_rank in range(self.parallel.tensor)
            for layout in self._layer(layer, tp_rank)
        )


class ListedShards(ShardedModel):
    """Ranks whose layouts are simply listed."""

    def __init__(self, layouts: Mapping[int, Sequence[ParamLayout]]) -> None:
        self._layouts = {rank: list(layouts[rank]) for rank in sorted(layouts)}
        self._holders = group_holders(
            ((rank,), layout) for rank, own in self._layouts.items() for layout in own
        )

    @property
    def num_ranks(self) -> int:
        """See ShardedModel."""
        return len(self._layouts)

    def rank_layouts(self, rank: int) -> list[ParamLayout]:
        """See ShardedModel."""
        return self._layouts[rank]

    def holders(self, tensor: str) -> Sequence[Holder]:
        """See ShardedModel."""
        return self._holders.get(tensor, ())


class ReplicatedShards(ShardedModel):
    """Several replicas of the ranks of a model; ranks are counted over all replicas."""

    def __init__(self, replica: ShardedModel, num_replicas: int) -> None:
        self.replica, self.num_replicas = replica, num_replicas
        self.low_rank = replica.low_rank

    @property
    def num_ranks(self) -> int:
        """See ShardedModel."""
        return self.num_replicas * self.replica.num_ranks

    def rank_layouts(self, rank: int) -> list[ParamLayout]:
        """See ShardedModel."""
        return self.replica.rank_layouts(rank % self.replica.num_ranks)

    def holders(self, tensor: str) -> Sequence[Holder]:
        """See ShardedModel."""
        firsts = range(0, self.num_ranks, self.replica.num_ranks)
        return [
            holder._replace(ranks=tuple(first + rank for first in firsts for rank in holder.ranks))
            for holder in self.replica.holders(tensor)
        ]

    @property
    def num_batches(self) -> int:
        """See ShardedModel."""
        return self.replica.num_batches

    def batch_of(self, param: str) -> int:
        """See ShardedModel."""
        return self.replica.batch_of(param)


def group_holders(
    shards: Iterable[tuple[tuple[int, ...], ParamLayout]],
) -> dict[str, list[Holder]]:
    """Holders by tensor, from (ranks, parameter) pairs; equal blocks are joined."""
    return join_holders(
        (ranks, layout.name, block) for ranks, layout in shards for block in layout.blocks
    )


def join_holders(
    parts: Iterable[tuple[tuple[int, ...], str, Block]],
) -> dict[str, list[Holder]]:
    """Holders by tensor; ranks that hold the same block under the same name are joined."""
    joined: dict[tuple[str, Block], tuple[int, ...]] = {}
    for ranks, param, block in parts:
        key = (param, block)
        joined[key] = joined[key] + ranks if key in joined else ranks
    holders: dict[str, list[Holder]] = {}
    for (param, block), ranks in joined.items():
        holders.setdefault(block.tensor, []).append(Holder(tuple(sorted(ranks)), param, block))
    return holders


def check_live_parameters(
    layouts: Iterable[ParamLayout], live: Mapping[str, tuple[int, ...]], side: str
) -> None:
    """Compare what a rank should hold with what it holds.

    Args:
        layouts: what the sizes say.
        live: names and shapes of the rank's parameters.
        side: the library that holds them, for the message.

    Raises:
        ValueError: lists every parameter that is missing, unknown or of another shape.
    """
    planned = {layout.name: layout.shape for layout in layouts}
    problems = [f"{name}: the model has no such parameter" for name in planned.keys() - live.keys()]
    problems += [f"{name}: has no layout" for name in live.keys() - planned.keys()]
    problems += [
        f"{name}: is {live[name]}, the layout says {shape}"
        for name, shape in planned.items()
        if name in live and live[name] != shape
    ]
    if problems:
        raise ValueError(
            f"{side}'s parameters on this rank differ from the layout of config.json:\n  "
            + "\n  ".join(sorted(problems))
        )
