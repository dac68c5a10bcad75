"""How long does a weight sync take, against the limit of the link and against the usual way?

    python benchmarks/weight_sync.py --case 8b-1gpu --case 8b-2gpu --repeat 5 --out runs.jsonl
    python benchmarks/weight_sync.py --case moe-2gpu --size tiny           # on CPU
    python benchmarks/weight_sync.py --table runs.jsonl --plot runs.png    # Markdown and a picture

Each case is a real job: Ray, megatron-core ranks, vLLM engines. In the same processes it measures
the sync, plain copies of the same bytes between the same GPUs ("floor"), and two baselines that
hand whole tensors to vLLM's loader; then it proves that sync and loader leave the same bits.
docs/benchmarks/README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` and `examples`

from benchmarks.weight_sync_cases import CASES, SIZES, Case, make_job
from benchmarks.weight_sync_ranks import PLAIN_BUFFER_BYTES, BenchmarkPolicy, BenchmarkTrainer
from chatlearn_vllm.config.schema import RuntimeConfig
from chatlearn_vllm.observability.logging import configure_driver_logging, get_logger
from chatlearn_vllm.runtime.cluster import Cluster
from chatlearn_vllm.runtime.weight_synchronizer import WeightSynchronizer
from chatlearn_vllm.runtime.worker_group import PendingCall, WorkerGroup, gather
from chatlearn_vllm.weight_sync.links import LinkKind

logger = get_logger(__name__)

BUCKET_BYTES = 512 * 2**20
DIGEST_STRIDE = RuntimeConfig.model_fields["validate_param_sync_stride"].default
MAX_SINGLE_LOADS = 400
"""Where a model has more parameters, so many of them are loaded one by one, evenly chosen."""


def main() -> None:
    """Run the cases, or print the table of earlier runs."""
    args = _parse_args()
    if args.table:
        results = [json.loads(line) for line in args.table.read_text().splitlines()]
        print(table(results))
        if args.plot:
            plot(results, args.plot)
        return
    configure_driver_logging()
    failed = False
    for name in args.case:
        try:
            result = run_case(name, args.size, args.repeat)
        except CaseError as error:
            failed, result = True, error.result | {"error": str(error)}
        line = json.dumps(result)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")
        print(line, flush=True)
    sys.exit(failed)


class CaseError(RuntimeError):
    """A case broke off; holds what it had measured by then."""

    def __init__(self, cause: BaseException, result: dict[str, Any]) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.result = result


def run_case(name: str, size: str = "real", repeat: int = 5) -> dict[str, Any]:
    """Run one case in processes of its own; returns what it measured.

    Raises:
        CaseError: something failed, or sync and vLLM's loader do not leave the same weights.
    """
    case = CASES[name]
    result = _head(name, size, case)
    with tempfile.TemporaryDirectory(prefix="weight-sync-") as directory:
        job = make_job(case, size, Path(directory))
        modules = [BenchmarkTrainer("trainer", job), BenchmarkPolicy("policy", job)]
        cluster = Cluster(job, modules)
        try:
            groups = cluster.start()
            for group in groups.values():
                group.call("init")
                group.call("model_setup")
            Benchmark(groups["trainer"], groups["policy"], repeat).run(result)
            for group in groups.values():
                group.call("shutdown")
        except (Exception, KeyboardInterrupt) as error:  # what was measured is kept
            raise CaseError(error, result) from error
        finally:
            cluster.stop()
    return result


def _head(name: str, size: str, case: Case) -> dict[str, Any]:
    model = {"model_type": case.model_type, **SIZES[size][case.model_type]}
    return {"case": name, "size": size, "layout": case.describe(), "model": model}


class Benchmark:
    """All measurements of a case, on running ranks."""

    def __init__(self, trainer: WorkerGroup, policy: WorkerGroup, repeat: int) -> None:
        self._trainer, self._policy, self._repeat = trainer, policy, repeat
        self._sync = WeightSynchronizer(trainer, policy, stride=DIGEST_STRIDE)

    def run(self, result: dict[str, Any]) -> None:
        """Measure, then prove; adds to `result` as it goes."""
        result["environment"] = self._policy.call("environment")[0]
        result |= self._measure_syncs()
        floor = result["floor"] = self._measure_floor(result.pop("wanted"))
        sync = result["sync"]["median_s"]
        ratios = result["ratios"] = {
            "sync_to_floor": sync / floor["seconds"],
            "digests_share_of_sync": 1 - result["sync_without_digests"]["median_s"] / sync,
        }
        with self._buckets_of(BUCKET_BYTES) as num_buckets:
            loads = result["gathered_buckets"] = self._measure_loads(num_buckets, per_tensor=False)
            ratios["gathered_buckets_to_sync"] = loads["median_s"] / sync
            differing = self._differences(num_buckets)
        assert not differing, f"sync and load_weights differ in {differing[:5]}"
        result["compared_parameters"] = self._policy.call("num_parameters")
        with self._buckets_of(0) as num_buckets:
            loads = result["per_tensor"] = self._measure_loads(num_buckets, per_tensor=True)
            ratios["per_tensor_to_sync"] = loads["median_s"] / sync

    # ---- the sync -----------------------------------------------------------------------------

    def _measure_syncs(self) -> dict[str, Any]:
        self._start_memory()
        start = time.perf_counter()
        self._sync.setup()
        result: dict[str, Any] = {"setup_s": time.perf_counter() - start}
        wanted = self._policy.call("bytes_by_source")
        result["wanted"] = wanted
        result["bytes_by_rank"] = [
            {
                kind.name.lower(): sum(size for between, size in own.values() if between == kind)
                for kind in LinkKind
            }
            for own in wanted
        ]
        result["first_sync"] = _summary([self._sync.sync().seconds])
        result["sync"] = self._time_syncs(self._repeat)
        result["sync_extra_memory"] = self._extra_memory()
        for name, stride in (("sync_all_bytes_digested", 1), ("sync_without_digests", None)):
            self._sync.stride = stride
            result[name] = self._time_syncs(self._repeat)
        self._sync.stride = DIGEST_STRIDE
        self._sync.keep_open = False
        result["sync_reopened"] = self._time_syncs(self._repeat)
        result["offloaded"] = self._time_offloaded(wanted)
        return result

    def _time_offloaded(self, wanted: list[dict[int, tuple[LinkKind, int]]]) -> dict[str, Any]:
        """A sync of weights that lie in pinned host memory, with what it would take from there.

        What it takes is `onload` and then `sync`. A direct way could not be faster than plain
        copies of each rollout rank's bytes from pinned memory, all ranks at once.
        """
        seconds: dict[str, list[float]] = {"offload": [], "onload": [], "sync": []}
        for _ in range(self._repeat):
            for what in ("offload", "onload"):
                start = time.perf_counter()
                self._trainer.call("move_weights", what)
                seconds[what].append(time.perf_counter() - start)
            seconds["sync"].append(self._sync.sync().seconds)
        sizes = [sum(size for _, size in own.values()) for own in wanted]
        copies = [
            self._policy.start_on(rank, "copy_from_host", size) for rank, size in enumerate(sizes)
        ]
        plain = max(statistics.median(own) for own in gather(copies))
        return {what: _summary(own) for what, own in seconds.items()} | {"plain_copy_s": plain}

    def _time_syncs(self, repeat: int) -> dict[str, Any]:
        seconds = [self._sync.sync().seconds for _ in range(repeat)]
        inside = []
        with self._watched():
            for _ in range(repeat):
                self._sync.sync()
                inside.append(self._take_seconds())
        parts = {part: statistics.median(one[part] for one in inside) for part in inside[0]}
        if "pull" in parts:
            parts["copy"] = parts.pop("pull") - parts.get("digests", 0.0)
        return _summary(seconds) | {"slowest_rank_s": parts}

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Within the block the ranks measure what they do."""
        gather([*self._trainer.start("watch", True), *self._policy.start("watch", True)])
        yield
        gather([*self._trainer.start("watch", False), *self._policy.start("watch", False)])

    def _take_seconds(self) -> dict[str, float]:
        """Seconds of the slowest rank since the last call, by what was done."""
        slowest: dict[str, float] = {}
        calls = [*self._trainer.start("take_seconds"), *self._policy.start("take_seconds")]
        for spent in gather(calls):
            for what, seconds in spent.items():
                slowest[what] = max(slowest.get(what, 0.0), seconds)
        return slowest

    def _start_memory(self) -> None:
        gather([*self._trainer.start("start_memory"), *self._policy.start("start_memory")])

    def _extra_memory(self) -> dict[str, int]:
        """Most bytes of any rank's tensors at a time, and of any device at the end."""
        trainer, policy = self._trainer.call("extra_memory"), self._policy.call("extra_memory")
        return {
            "trainer_peak_bytes": max(peak for peak, _ in trainer),
            "rollout_peak_bytes": max(peak for peak, _ in policy),
            "device_bytes_kept": max(kept for _, kept in [*trainer, *policy]),
        }

    # ---- the floor ----------------------------------------------------------------------------

    def _measure_floor(self, wanted: list[dict[int, tuple[LinkKind, int]]]) -> dict[str, Any]:
        """Plain copies of what each rank reads, all ranks at once."""
        largest: dict[int, int] = {}
        for own in wanted:
            for source, (_, size) in own.items():
                largest[source] = max(largest.get(source, 0), min(size, PLAIN_BUFFER_BYTES))
        shown = {
            source: self._trainer.start_on(source, "show_plain_buffer", size)
            for source, size in sorted(largest.items())
        }
        copies = [
            self._policy.start_on(
                rank, "copy_plainly", own, sorted(own), *(shown[one].result for one in sorted(own))
            )
            for rank, own in enumerate(wanted)
        ]
        found = gather(copies, inputs=list(shown.values()))
        gather([self._trainer.start_on(source, "forget_plain_buffer") for source in shown])
        seconds: dict[str, float] = {}
        rates: dict[str, dict[str, float]] = {}
        for method in found[0]:
            by_rank = [
                {kind: statistics.median(times) for kind, times in own[method].items()}
                for own in found
            ]
            seconds[method] = max(sum(own.values()) for own in by_rank)
            rates[method] = {
                kind.name.lower(): min(
                    sum(size for between, size in own.values() if between == kind) / times[kind]
                    for own, times in zip(wanted, by_rank, strict=True)
                    if kind in times
                )
                / 1e9
                for kind in LinkKind
                if any(kind in times for times in by_rank)
            }
        best = min(seconds, key=seconds.__getitem__)
        return {"seconds": seconds[best], "method": best, "by_method": seconds, "gb_per_s": rates}

    # ---- baselines ----------------------------------------------------------------------------

    @contextmanager
    def _buckets_of(self, num_bytes: int) -> Iterator[int]:
        """Within the block the trainer can gather so many buckets."""
        self._start_memory()
        yield self._trainer.call("plan_buckets", num_bytes)[0]
        self._policy.call("close_bucket")
        self._trainer.call("forget_buckets")

    def _measure_loads(self, num_buckets: int, *, per_tensor: bool) -> dict[str, Any]:
        stride = -(-num_buckets // MAX_SINGLE_LOADS) if per_tensor else 1
        buckets = range(0, num_buckets, stride)
        self._load(buckets, per_tensor)
        seconds = []
        for _ in range(1 if stride > 1 else self._repeat):
            start = time.perf_counter()
            self._load(buckets, per_tensor)
            seconds.append((time.perf_counter() - start) * num_buckets / len(buckets))
        with self._watched():
            self._load(buckets, per_tensor)
            inside = self._take_seconds()
        return _summary(seconds) | {
            "calls": num_buckets,
            "measured_calls": len(buckets),
            "slowest_rank_s": inside,
            "extra_memory": self._extra_memory(),
        }

    def _load(self, buckets: range, per_tensor: bool) -> None:
        """Gather and load bucket by bucket; each waits for the one before on its GPU only."""
        source_of = self._source_of_each_rank()
        self._policy.call("begin_load")
        gathers: list[PendingCall] = []
        loads: list[PendingCall] = []
        last: dict[int, list[Any]] = {}
        for bucket in buckets:
            shown = [
                self._trainer.start_on(rank, "gather_bucket", bucket, *last.get(rank, ()))
                for rank in range(len(self._trainer.ranks))
            ]
            last = {}
            for rank, source in enumerate(source_of):
                load = self._policy.start_on(rank, "load_bucket", per_tensor, shown[source].result)
                last.setdefault(source, []).append(load.result)
                loads.append(load)
            gathers += shown
        gather(loads, inputs=gathers)
        self._policy.call("finish_load", self._sync.version)

    def _source_of_each_rank(self) -> list[int]:
        """The training rank on the same GPU, where there is one, else any."""
        trainer = [gpu for gpu, _ in self._trainer.call("weight_gpu")]
        policy = [gpu for gpu, _ in self._policy.call("weight_gpu")]
        return [
            trainer.index(gpu) if gpu is not None and gpu in trainer else rank % len(trainer)
            for rank, gpu in enumerate(policy)
        ]

    # ---- the proof ----------------------------------------------------------------------------

    def _differences(self, num_buckets: int) -> list[str]:
        """Sync new weights; the parameters that vLLM's loader makes otherwise."""
        self._trainer.call("refill", 1)
        self._sync.sync()
        self._policy.call("keep_and_spoil_weights")
        self._load(range(num_buckets), per_tensor=False)
        found = self._policy.call("differences_from_kept")
        return [f"rank {rank}: {name}" for rank, names in enumerate(found) for name in names]


def _summary(seconds: list[float]) -> dict[str, Any]:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "all_s": seconds}


# ---- table and plot ---------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    """Markdown of several cases."""
    header = [
        "case", "trainer -> rollout", "GB per rank: same GPU + other GPU", "sync", "no digests",
        "floor", "sync / floor", "buckets", "buckets / sync", "per tensor", "per tensor / sync",
        "extra memory: sync, buckets",
    ]  # fmt: skip
    rows = [header, ["---"] * len(header), *map(_row, results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(result: dict[str, Any]) -> list[str]:
    read = max(result["bytes_by_rank"], key=lambda own: sum(own.values()))
    ratios = result["ratios"]
    memories = [result["sync_extra_memory"], result["gathered_buckets"]["extra_memory"]]
    return [
        result["case"],
        result["layout"],
        f"{read['device'] / 1e9:.2f} + {(read['host'] + read['network']) / 1e9:.2f}",
        _ms(result["sync"]["median_s"]),
        _ms(result["sync_without_digests"]["median_s"]),
        _ms(result["floor"]["seconds"]),
        f"{ratios['sync_to_floor']:.2f}",
        _ms(result["gathered_buckets"]["median_s"]),
        f"{ratios['gathered_buckets_to_sync']:.1f}",
        _ms(result["per_tensor"]["median_s"]),
        f"{ratios['per_tensor_to_sync']:.1f}",
        ", ".join(
            f"{(own['trainer_peak_bytes'] + own['rollout_peak_bytes']) / 2**20:,.0f} MiB"
            for own in memories
        ),
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the times of several cases as bars, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = {
        "floor: plain copy of the bytes": lambda r: r["floor"]["seconds"],
        "copy inside the slowest rank": lambda r: r["sync"]["slowest_rank_s"]["copy"],
        "sync, seen by the driver": lambda r: r["sync"]["median_s"],
        "gathered buckets + load_weights": lambda r: r["gathered_buckets"]["median_s"],
        "per tensor load_weights": lambda r: r["per_tensor"]["median_s"],
    }
    results = [result for result in results if "per_tensor" in result]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(bars)
    for number, (label, seconds_of) in enumerate(bars.items()):
        places = [case + (number - len(bars) / 2 + 0.5) * width for case in range(len(results))]
        drawn = axes.bar(places, [1e3 * seconds_of(r) for r in results], width, label=label)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    names = [f"{result['case'].split('-')[0]}\n{result['layout']}" for result in results]
    axes.set_xticks(range(len(results)), names)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, default=[])
    parser.add_argument("--repeat", type=int, default=5, help="syncs of each kind")
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--out", type=Path, help="file that one JSON line per case is added to")
    parser.add_argument("--table", type=Path, help="print a table of such a file instead")
    parser.add_argument("--plot", type=Path, help="with --table: also draw it into this PNG")
    args = parser.parse_args()
    if not args.case and not args.table:
        parser.error("--case or --table is needed")
    return args


if __name__ == "__main__":
    main()
