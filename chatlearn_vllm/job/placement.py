"""Which rank of which model sits on which device, and who shares it?

A bundle is one device: a GPU, or a CPU core on a machine without GPUs. The models of one
`runtime.colocation` entry lie over each other, each starting at the first bundle of the group;
every other model gets bundles of its own. Ranks of a replica are on consecutive bundles. Where
models have a `device_mapping`, they lie on the devices that it names, rank after rank, instead.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from chatlearn_vllm.config import JobConfig, ModelConfig


@dataclass(frozen=True)
class RankPlacement:
    """One process of one model."""

    model: str
    replica: int
    rank: int
    """Within the replica."""
    world_size: int
    """Ranks of the replica."""
    bundle: int | None
    """Index of the device among those of the job; None for a model without devices."""
    share: float
    """Part of the device, 1 / number of ranks on it; 0.0 without a device."""
    num_cpu: int = 0
    """CPU cores of a process without a device."""


@dataclass(frozen=True)
class PlacementPlan:
    """Where all ranks of a job go."""

    devices: tuple[int, ...]
    """Number of the device behind each bundle: counted up, or those that `device_mapping` names."""
    ranks: tuple[RankPlacement, ...]
    """Models in the order of the job, then replicas, then ranks."""

    @property
    def num_bundles(self) -> int:
        """Devices that the job needs."""
        return len(self.devices)

    def of_model(self, model: str) -> tuple[RankPlacement, ...]:
        """The ranks of one model, by replica and rank."""
        return tuple(rank for rank in self.ranks if rank.model == model)

    def on_bundle(self, bundle: int) -> tuple[RankPlacement, ...]:
        """The ranks that share one device."""
        return tuple(rank for rank in self.ranks if rank.bundle == bundle)

    def neighbours(self, rank: RankPlacement) -> tuple[str, ...]:
        """The other models on a rank's device."""
        if rank.bundle is None:
            return ()
        models = dict.fromkeys(other.model for other in self.on_bundle(rank.bundle))
        return tuple(model for model in models if model != rank.model)

    def shares_devices(self, model: str) -> bool:
        """Whether another model has a rank on a device of this one."""
        bundles = {rank.bundle for rank in self.of_model(model)} - {None}
        return any(rank.bundle in bundles for rank in self.ranks if rank.model != model)

    def describe(self) -> str:
        """A text table: one row per device, one column per model, `replica.rank` in the cells."""
        models = list(dict.fromkeys(rank.model for rank in self.ranks if rank.bundle is not None))
        rows = [["device", "share", *models]]
        cells_of: dict[int | None, dict[str, str]] = {}
        for rank in self.ranks:
            cells_of.setdefault(rank.bundle, {})[rank.model] = f"{rank.replica}.{rank.rank}"
        for bundle, device in enumerate(self.devices):
            cells = cells_of.get(bundle, {})
            row = [str(device), f"1/{len(cells)}", *(cells.get(model, "-") for model in models)]
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        for model in dict.fromkeys(rank.model for rank in self.ranks if rank.bundle is None):
            processes = self.of_model(model)
            cpus = f"{processes[0].num_cpu} CPU" + "s" * (processes[0].num_cpu > 1)
            lines.append(f"no device: {model}, {len(processes)} x {cpus}")
        return "\n".join(lines)


def place(job: JobConfig, only: Collection[str] | None = None) -> PlacementPlan:
    """Lay the models of a job out over their device_mapping, or over as few devices as its
    colocation allows.

    Args:
        job: checked, so device counts fit the parallel sizes and groups name known models.
        only: the models that take part; None = all of the job.
    """
    models = {name: model for name, model in job.models.items() if only is None or name in only}
    mapped = {name: model.device_mapping for name, model in models.items() if model.device_mapping}
    if mapped:
        devices = tuple(sorted({device for own in mapped.values() for device in own}))
        bundle_of = {device: bundle for bundle, device in enumerate(devices)}
        bundles = {name: [bundle_of[device] for device in own] for name, own in mapped.items()}
    else:
        first_bundle, num_bundles = _first_bundles(models, job.runtime.colocation_groups())
        devices = tuple(range(num_bundles))
        bundles = {
            name: list(range(first, first + models[name].num_gpu))
            for name, first in first_bundle.items()
        }
    num_ranks_on = Counter(bundle for own in bundles.values() for bundle in own)
    ranks = [
        rank
        for name, model in models.items()
        for rank in (
            _device_ranks(model, bundles[name], num_ranks_on)
            if model.num_gpu
            else _cpu_ranks(model)
        )
    ]
    return PlacementPlan(devices, tuple(ranks))


def _first_bundles(
    models: Mapping[str, ModelConfig], groups: Sequence[Sequence[str]]
) -> tuple[dict[str, int], int]:
    """The first bundle of each model with devices, and the number of bundles."""
    group_of = {name: group for group in groups for name in group}
    first_bundle: dict[str, int] = {}
    num_bundles = 0
    for name, model in models.items():
        if not model.num_gpu or name in first_bundle:
            continue
        group = [member for member in group_of.get(name, (name,)) if member in models]
        first_bundle |= dict.fromkeys(group, num_bundles)
        num_bundles += max(models[member].num_gpu for member in group)
    return first_bundle, num_bundles


def _device_ranks(
    model: ModelConfig, bundles: Sequence[int], num_ranks_on: Mapping[int, int]
) -> list[RankPlacement]:
    size = model.ranks_per_replica
    return [
        RankPlacement(
            model=model.name,
            replica=index // size,
            rank=index % size,
            world_size=size,
            bundle=bundle,
            share=1 / num_ranks_on[bundle],
        )
        for index, bundle in enumerate(bundles)
    ]


def _cpu_ranks(model: ModelConfig) -> list[RankPlacement]:
    return [
        RankPlacement(model.name, replica, 0, 1, None, 0.0, model.cpu_per_process)
        for replica in range(model.num_replica)
    ]
