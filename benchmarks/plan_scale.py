"""What does planning a weight sync cost one rank, as the numbers of ranks and layers grow?

The model has the sizes of the largest open mixtures of experts: 61 layers, the first three of them
dense, 256 experts, 675 billion parameters. Each line of the output is what one rank does at the
start of a job, in a process that has done nothing before: describe all ranks of both sides, find
its own parameters, plan its copies.

    python benchmarks/plan_scale.py > docs/benchmarks/plan_scale.jsonl
    python benchmarks/plan_scale.py --layers 61 --ranks 1024    # only these lines
"""

import argparse
import json
import math
import multiprocessing
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatlearn_vllm.layouts import (
    MegatronShards,
    ModelShape,
    RolloutParallel,
    TrainParallel,
    VLLMShards,
)
from chatlearn_vllm.weight_sync.links import Links, Place
from chatlearn_vllm.weight_sync.planner import plan_reader, plan_sender

SIZES = [(61, 64), (61, 128), (61, 256), (61, 512), (61, 1024), (47, 1024), (33, 1024), (19, 1024)]
"""(layers, ranks of either side)."""
GPUS_PER_HOST = 8
ROLLOUT_TENSOR = 32


@dataclass(frozen=True)
class Case:
    """What is measured: as many training as rollout ranks, on the same GPUs."""

    layers: int
    ranks: int
    rollout_expert_parallel: bool
    side: str
    """"reader" for a rollout rank, "sender" for a training rank."""


def main() -> None:
    """Measure, and print one line of JSON per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, choices=sorted({n for n, _ in SIZES}))
    parser.add_argument("--ranks", type=int, choices=sorted({n for _, n in SIZES}))
    arguments = parser.parse_args()
    cases = [
        Case(layers, ranks, expert_parallel, side)
        for layers, ranks in SIZES
        for expert_parallel in (False, True)
        for side in ("reader", "sender")
        if arguments.layers in (None, layers) and arguments.ranks in (None, ranks)
    ]
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as fresh_process:
        for result in fresh_process.imap(measure, cases):
            print(json.dumps(result), flush=True)


def measure(case: Case) -> dict[str, Any]:
    """Plan one rank and count what the plan holds."""
    wall, cpu = time.perf_counter(), time.process_time()
    model = model_shape(case.layers)
    senders = MegatronShards(model, train_parallel(case))
    rollout = RolloutParallel(
        ROLLOUT_TENSOR,
        expert=case.rollout_expert_parallel,
        replicas=case.ranks // ROLLOUT_TENSOR,
    )
    readers = VLLMShards(model, rollout)
    gpus = [Place(f"host {i // GPUS_PER_HOST}", f"GPU {i}") for i in range(case.ranks)]
    links = Links(gpus, gpus, ROLLOUT_TENSOR)
    rank = case.ranks // 2 + 5  # in the middle of the pipeline and of the replicas
    if case.side == "reader":
        layouts = readers.rank_layouts(rank)
        plan = plan_reader(rank, layouts, senders, links)
        copies, peers = plan.copies, len(plan.source_ranks)
    else:
        layouts = senders.rank_layouts(rank)
        by_reader = plan_sender(rank, senders, readers, links)
        copies, peers = [c for own in by_reader.values() for c in own], len(by_reader)
    return asdict(case) | {
        "cpu_s": round(time.process_time() - cpu, 3),
        "wall_s": round(time.perf_counter() - wall, 3),
        "peak_rss_mb": round(peak_rss_bytes() / 1e6, 1),
        "copies": len(copies),
        "peers": peers,
        "copied_elements": sum(copy.num_elements for copy in copies),
        "rank_elements": sum(math.prod(layout.shape) for layout in layouts),
    }


def model_shape(num_layers: int) -> ModelShape:
    """The model; only its number of layers varies."""
    return ModelShape(
        num_layers=num_layers, hidden_size=7168, ffn_hidden_size=18432, num_attention_heads=128,
        num_query_groups=32, head_dim=128, vocab_size=129280, tie_word_embeddings=False,
        model_type="qwen3_moe", num_experts=256, moe_ffn_hidden_size=2048,
        dense_layers=frozenset(range(3)),
    )  # fmt: skip


def train_parallel(case: Case) -> TrainParallel:
    """Tensor parallel 8, 16 stages (8 for 64 ranks), experts over all ranks of a stage."""
    stages = min(16, case.ranks // 8)
    return TrainParallel(
        case.ranks, tensor=8, pipeline=stages, expert=case.ranks // stages, expert_tensor=1,
        first_stage_layers=3, last_stage_layers={16: 2, 8: 4}[stages],
    )  # fmt: skip


def peak_rss_bytes() -> int:
    """Of this process. (`ru_maxrss` would count the process that started it, too.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    main()
