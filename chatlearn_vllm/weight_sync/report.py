"""What would a weight sync move for given sizes, over which links, and is its plan complete?

Pure Python: answers for a thousand GPUs on any machine. Rank i of either side is taken to run on
GPU i, as where trainer and rollout share their GPUs.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from chatlearn_vllm.layouts import (
    Block,
    MegatronShards,
    ParamLayout,
    RolloutParallel,
    TrainParallel,
    VLLMShards,
)
from chatlearn_vllm.weight_sync.links import BUCKET_BYTES, LinkKind, Links, Place
from chatlearn_vllm.weight_sync.planner import (
    Copy,
    RankPlan,
    check_agreement,
    fingerprint,
    plan_reader,
    plan_sender,
)
from chatlearn_vllm.weight_sync.sync_options import ELEMENT_BYTES, SyncOptions

DEVICE_BYTES_PER_S = 1.9e12
"""Copied within one GPU; measured on an H200."""
HOST_BYTES_PER_S = 374e9
"""Read by one GPU from another one of its host; measured between H200s."""

MAX_RANKS_PLANNED = 64
"""Larger sides are judged by a sample."""
SAMPLE_SIZE = 16
"""Ranks of a larger side that are planned."""

LINK_NAMES = {
    LinkKind.DEVICE: "same GPU",
    LinkKind.HOST: "same host",
    LinkKind.NETWORK: "network",
}


@dataclass(frozen=True)
class LinkTraffic:
    """What one sync moves over links of one kind."""

    num_bytes: int
    """Of all ranks."""
    busiest_reader_bytes: int
    """Received by the GPU that receives most."""
    busiest_sender_bytes: int
    """Sent by the GPU that sends most."""


@dataclass(frozen=True)
class SyncReport:
    """What a weight sync would do; complete, or it would not have been made."""

    model_type: str
    num_layers: int
    num_parameters: int
    dtype: str
    model_bytes: int
    train: TrainParallel
    rollout: RolloutParallel
    num_gpus: int
    num_hosts: int
    num_readers_planned: int
    num_senders_planned: int
    is_sample: bool
    """Whether totals are projected from the planned ranks."""
    num_copies: int
    """Of all rollout ranks."""
    max_copies_per_rank: int
    links: dict[str, LinkTraffic]
    """By kind of link."""
    staging_bytes: int
    """Largest buffers of a GPU for one link, of which it works one at a time; nothing is staged
    within a host."""
    predicted_s: float
    """Time of the busiest GPU's bytes at the links' speeds; calls and latencies come on top."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    def describe(self) -> str:
        """A text for people."""
        facts = [
            ("model", f"{self.model_type}, {self.num_layers} layers, "
             f"{_si(self.num_parameters)} parameters, {_si(self.model_bytes)}B in {self.dtype}"),
            ("training", f"{self.train.world_size} ranks: {_train_text(self.train)}"),
            ("rollout", f"{self.rollout.world_size} ranks: {_rollout_text(self.rollout)}"),
            ("placement", f"rank i of either side on GPU i; GPUs: {self.num_gpus}, "
             f"hosts: {self.num_hosts}"),
            ("planned", f"{self.num_readers_planned} of {self.rollout.world_size} rollout ranks, "
             f"{self.num_senders_planned} of {self.train.world_size} training ranks"
             + (" (a sample; totals are projected from it)" if self.is_sample else "")),
            ("coverage", "complete: every rollout element is written once, every trained weight "
             "is used" + (" on the planned ranks" if self.is_sample else "")),
            ("copies", f"{self.num_copies:,}, at most {self.max_copies_per_rank:,} per rank"),
            ("staging", f"{_si(self.staging_bytes)}B" if self.staging_bytes else "none"),
            ("predicted", f"{self.predicted_s:.3g} s for the bytes of the busiest GPU"),
        ]  # fmt: skip
        rows = [("link", "bytes per sync", "busiest receiver", "busiest sender")]
        rows += [
            (name, *(f"{_si(n)}B" for n in asdict(traffic).values()))
            for name, traffic in self.links.items()
        ]
        lines = [f"{name:<11}{value}" for name, value in facts]
        table = [f"{row[0]:<11}" + "".join(f"{cell:>18}" for cell in row[1:]) for row in rows]
        return "\n".join([*lines, "", *table])


def report(options: SyncOptions) -> SyncReport:
    """Plan the ranks, or a sample of them, prove both sides complete, and add up.

    Raises:
        ValueError: the plan is incomplete, or writes an element twice.
    """
    plans = _Planning(options)
    senders, readers = plans.senders.num_ranks, plans.readers.num_ranks
    planned_senders, planned_readers = _sample(senders), _sample(readers)
    for rank in planned_readers:
        plans.read(rank)
    for rank in planned_senders:
        plans.send(rank)
    plans.compare()
    links = {}
    for kind, name in LINK_NAMES.items():
        into = [traffic[kind] for traffic in plans.received.values()]
        out = [traffic[kind] for traffic in plans.sent.values()]
        total = sum(into) * readers // len(planned_readers)
        links[name] = LinkTraffic(total, max(into), max(out))
    model, element_bytes = options.model, ELEMENT_BYTES[options.dtype]
    num_parameters = sum(math.prod(model.tensor_shape(name)) for name in model.tensor_names())
    return SyncReport(
        model_type=model.model_type,
        num_layers=model.num_layers,
        num_parameters=num_parameters,
        dtype=options.dtype,
        model_bytes=num_parameters * element_bytes,
        train=options.train,
        rollout=options.rollout,
        num_gpus=options.num_gpus,
        num_hosts=-(-options.num_gpus // options.gpus_per_host),
        num_readers_planned=len(planned_readers),
        num_senders_planned=len(planned_senders),
        is_sample=len(planned_readers) < readers or len(planned_senders) < senders,
        num_copies=sum(plans.num_copies) * readers // len(planned_readers),
        max_copies_per_rank=max(plans.num_copies),
        links=links,
        staging_bytes=plans.staging_bytes,
        predicted_s=max(
            _seconds(traffic, options.network_bytes_per_s)
            for traffic in (*plans.received.values(), *plans.sent.values())
        ),
    )


class _Planning:
    """Plans ranks one by one and keeps what they add up to, not the plans."""

    def __init__(self, options: SyncOptions) -> None:
        self.senders = MegatronShards(options.model, options.train)
        self.readers = VLLMShards(options.model, options.rollout)
        per_host = options.gpus_per_host
        gpus = [Place(f"host {i // per_host}", f"GPU {i}") for i in range(options.num_gpus)]
        self._links = Links(
            gpus[: self.senders.num_ranks],
            gpus[: self.readers.num_ranks],
            options.rollout.ranks_per_replica,
        )
        self._element_bytes = ELEMENT_BYTES[options.dtype]
        self._read: dict[int, dict[int, str]] = {}
        self._sent: dict[int, dict[int, str]] = {}
        self.num_copies: list[int] = []
        self.received: dict[int, Counter[LinkKind]] = {}
        self.sent: dict[int, Counter[LinkKind]] = {}
        self.staging_bytes = 0
        """Of the link between two planned ranks that needs most; a rank works one at a time."""

    def read(self, rank: int) -> None:
        """Plan a rollout rank."""
        layouts = self.readers.rank_layouts(rank)
        plan = plan_reader(rank, layouts, self.senders, self._links)
        check_written_once(plan, layouts)
        by_source = plan.by_source()
        self.num_copies.append(len(plan.copies))
        self.received[rank] = self._traffic((rank, sender, c) for sender, c in by_source.items())
        self._read[rank] = {sender: fingerprint(copies) for sender, copies in by_source.items()}

    def send(self, rank: int) -> None:
        """Plan a training rank."""
        by_reader = plan_sender(rank, self.senders, self.readers, self._links)
        self.sent[rank] = self._traffic((reader, rank, c) for reader, c in by_reader.items())
        self._sent[rank] = {reader: fingerprint(copies) for reader, copies in by_reader.items()}

    def compare(self) -> None:
        """Check that planned ranks of both sides agree on what goes between them."""
        check_agreement(_only(self._read, self._sent), _only(self._sent, self._read))

    def _traffic(self, parts: Iterable[tuple[int, int, Iterable[Copy]]]) -> Counter[LinkKind]:
        """Bytes by kind of link, of (reader, sender, copies)."""
        traffic: Counter[LinkKind] = Counter()
        for reader, sender, copies in parts:
            kind = self._links.kind(reader, sender)
            num_bytes = sum(copy.num_elements for copy in copies) * self._element_bytes
            traffic[kind] += num_bytes
            if kind is LinkKind.NETWORK:
                needed = num_bytes if num_bytes <= BUCKET_BYTES else 2 * BUCKET_BYTES
                self.staging_bytes = max(self.staging_bytes, needed)
        return traffic


def check_written_once(plan: RankPlan, layouts: Iterable[ParamLayout]) -> None:
    """Prove that a plan writes each element of each parameter exactly once, padding included.

    Raises:
        ValueError: an element is written twice or never; names the parameter and the rectangles.
    """
    written: defaultdict[str, list[Block]] = defaultdict(list)
    for copy in plan.copies:
        written[copy.target_param].append(Block(copy.source_param, copy.source, copy.target))
    for name, rect in plan.padding:
        written[name].append(Block("padding", rect, rect))
    for layout in layouts:
        # A layout refuses rectangles that do not tile their parameter.
        ParamLayout(layout.name, layout.shape, tuple(written[layout.name]))


def _only(
    planned: Mapping[int, Mapping[int, str]], others: Mapping[int, Any]
) -> dict[int, dict[int, str]]:
    """Fingerprints between ranks that were both planned."""
    return {
        rank: {other: text for other, text in own.items() if other in others}
        for rank, own in planned.items()
    }


def _sample(num_ranks: int) -> list[int]:
    """The ranks to plan: all, or some at different places of different replicas."""
    if num_ranks <= MAX_RANKS_PLANNED:
        return list(range(num_ranks))
    blocks = [number * num_ranks // SAMPLE_SIZE for number in range(SAMPLE_SIZE)]
    size = num_ranks // SAMPLE_SIZE  # of the smallest
    return [first + number % size for number, first in enumerate(blocks)]


def _seconds(traffic: Mapping[LinkKind, int], network_bytes_per_s: float) -> float:
    return (
        traffic[LinkKind.DEVICE] / DEVICE_BYTES_PER_S
        + traffic[LinkKind.HOST] / HOST_BYTES_PER_S
        + traffic[LinkKind.NETWORK] / network_bytes_per_s
    )


# ---- text -----------------------------------------------------------------------------------


def _train_text(train: TrainParallel) -> str:
    sizes = {
        "tp": train.tensor, "pp": train.pipeline, "vpp": train.virtual_pipeline,
        "dp": train.world_size // (train.tensor * train.pipeline), "ep": train.expert,
        "etp": train.expert_tensor, "first": train.first_stage_layers,
        "last": train.last_stage_layers,
    }  # fmt: skip
    return _sizes_text(sizes)


def _rollout_text(rollout: RolloutParallel) -> str:
    sizes = {"tp": rollout.tensor, "pp": rollout.pipeline, "replicas": rollout.replicas}
    return _sizes_text(sizes) + (", experts whole" if rollout.expert else "")


def _sizes_text(sizes: Mapping[str, int | None]) -> str:
    """Sizes that matter; the tensor parallel size always."""
    return ", ".join(
        f"{key} {size}" for key, size in sizes.items() if size and (size > 1 or key == "tp")
    )


def _si(number: float) -> str:
    """Three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"
