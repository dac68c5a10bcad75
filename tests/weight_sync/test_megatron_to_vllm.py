"""Do trained weights arrive bitwise in live vLLM parameters, for pairs of parallel layouts?

Real megatron-core ranks take an optimizer step and write a Hugging Face checkpoint. Real vLLM
ranks pull the weights, and are compared with what vLLM's own loader makes of that checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatlearn_vllm.layouts import ShardedModel
from chatlearn_vllm.weight_sync.digest import EVERYTHING
from chatlearn_vllm.weight_sync.links import colocated
from chatlearn_vllm.weight_sync.planner import check_agreement
from chatlearn_vllm.weight_sync.sender import WeightSender
from chatlearn_vllm.weight_sync.transport import Export, OpenedExport, export_tensors
from tests.helpers import rollout_ranks
from tests.helpers.ranks import Ranks
from tests.helpers.rollout_ranks import assert_same_answers, hugging_face_answers
from tests.helpers.tiny_llama import save_character_tokenizer, save_tiny_llama
from tests.helpers.tiny_moe import save_tiny_moe
from tests.megatron import tiny_models

DENSE = {
    "tp1": {},
    "tp2": {"tp": 2},
    "pp2 uneven": {"pp": 2, "first": 1},
    "tp2 pp2 vpp2": {"tp": 2, "pp": 2, "vpp": 2},
    "dp2": {"world": 2},
    "tp2 lora": {"tp": 2, "lora_r": 4, "lora_alpha": 32.0},
}
MIXTURE = {
    "ep2": {"ep": 2, "world": 2},
    "tp2 ep2": {"tp": 2, "ep": 2, "world": 4},
    "pp2 ep2 etp1": {"pp": 2, "ep": 2, "etp": 1, "world": 4, "first": 1},
}
"""Training layouts: sizes of the parallel groups, number of ranks, settings of the model."""


@dataclass(frozen=True)
class Trained:
    """What a trainer leaves: its description, each rank's memory, a checkpoint, its answers."""

    shards: ShardedModel
    exports: list[Export]
    checkpoint: Path
    answers: list


def train_and_export(model_dir: Path, save_dir: Path, settings: dict[str, Any]):
    """On a training rank: an optimizer step or two, then description and memory."""
    from chatlearn_vllm.weight_sync.lora import adapter_names

    with tiny_models.engine(model_dir, **settings) as engine:
        tiny_models.train(engine, steps=2)
        engine.save_hf(save_dir)
        tensors = {name: p.data for name, p in engine.parameters.named()}
        for name, matrices in engine.parameters.adapters().items():
            tensors |= zip(adapter_names(name), matrices, strict=True)
        engine.parameters.check_layouts(
            engine.parameters.shards().rank_layouts(torch.distributed.get_rank())
        )
        return engine.parameters.shards(), export_tensors(tensors)


def train(root: Path, name: str, settings: dict[str, Any]) -> Trained:
    settings = dict(settings)
    smallest = settings.get("tp", 1) * settings.get("pp", 1)
    ranks = Ranks(settings.pop("world", smallest))
    try:
        results = ranks.run(train_and_export, root / "init", root / name, settings)
    finally:
        ranks.close()
    shards, exports = zip(*results, strict=True)
    assert all(one == shards[0] for one in shards[1:])
    answers = hugging_face_answers(root / name)
    return Trained(shards[0], list(exports), root / name, answers)


def describe(num_replicas: int) -> ShardedModel:
    """On a rollout rank."""
    return rollout_ranks.policy().weight_shards(num_replicas)


def pull(sources, targets, exports, sent, version: int):
    """On a rollout rank: plan, copy and declare complete; what it planned, got and has now."""
    policy = rollout_ranks.policy()
    rank, links = policy.rank, colocated(sources.num_ranks, targets.num_ranks, targets.num_ranks)
    plan = policy.plan_weight_sync(rank, sources, targets, links)
    needed = tuple(sorted(plan.fingerprints))
    policy.import_weights(needed, False, EVERYTHING, *(exports[source] for source in needed))
    assert policy.engine_state().startswith("STALE")
    arrival = policy.finish_weight_sync(version, needed, *(sent[rank] for rank in needed))
    live = {name: p.detach().clone() for name, p in policy.engine.parameters().items()}
    return plan.fingerprints, arrival, live, rollout_ranks.answers()


def load_with_vllm(checkpoint: Path) -> dict[str, torch.Tensor]:
    """On a rollout rank: the parameters that vLLM's own loader makes of a checkpoint."""
    policy = rollout_ranks.policy()
    with torch.no_grad():
        for parameter in policy.engine.parameters().values():
            parameter.fill_(float("nan"))
        policy.model.load_weights(load_file(checkpoint / "model.safetensors").items())
    return {name: p.detach().clone() for name, p in policy.engine.parameters().items()}


def check_pull(rollout: Ranks, trained: Trained, version: int, what: str) -> list:
    """Sync into all rollout ranks, compare plans and digests; the ranks' parameters."""
    targets = rollout.run(describe, 1)[0]
    links = colocated(trained.shards.num_ranks, targets.num_ranks, targets.num_ranks)
    sent, fingerprints = [], {}
    for rank, export in enumerate(trained.exports):
        tensors = OpenedExport(export).tensors
        sender = WeightSender(rank, lambda tensors=tensors: tensors, lambda: 0)
        fingerprints[rank] = sender.plan(trained.shards, targets, links)
        sent.append(sender.sent())
    pulled = rollout.run(pull, trained.shards, targets, trained.exports, sent, version)
    check_agreement({rank: own for rank, (own, *_) in enumerate(pulled)}, fingerprints)
    for _, arrival, live, answers in pulled:
        assert arrival.is_good, (what, arrival)
        assert all(tensor.isfinite().all() for tensor in live.values()), what
        assert_same_answers(answers, trained.answers)
    return [live for _, _, live, _ in pulled]


def check_all(root: Path, done: dict[str, Trained], rollout: dict[str, Any]) -> None:
    """One engine, and every trainer's weights into it, one after the other."""
    tp, pp = rollout.get("tp", 1), rollout.get("pp", 1)
    options = {key: value for key, value in rollout.items() if key not in ("tp", "pp")}
    ranks = Ranks(tp * pp)
    try:
        job_dir = root / f"jobs {sorted(rollout.items())}".replace("/", " ")
        states = ranks.run(rollout_ranks.build, job_dir, root / "init", tp, pp, **options)
        assert set(states) == {"DUMMY"}
        for version, (name, trained) in enumerate(done.items(), 1):
            pulled = check_pull(ranks, trained, version, name)
            if "lora" in name or "weight_sync_path" in options:
                continue  # the answers say it: a merge rounds; the loader is what is tested here
            for got, want in zip(
                pulled, ranks.run(load_with_vllm, trained.checkpoint), strict=True
            ):
                assert got.keys() == want.keys()
                for param in want:
                    rows = want[param].isfinite()  # the loader leaves padding alone
                    assert torch.equal(got[param][rows], want[param][rows]), f"{name}: {param}"
    finally:
        ranks.close()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    save_tiny_llama(root / "init", num_hidden_layers=4)
    return root, {name: train(root, name, settings) for name, settings in DENSE.items()}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    save_tiny_moe(root / "init", "qwen3_moe")
    return root, {name: train(root, name, settings) for name, settings in MIXTURE.items()}


@pytest.mark.parametrize(
    "rollout",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"tp": 2},
        pytest.param({"pp": 2}, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "pp": 2}, marks=pytest.mark.slow),
        {"tp": 2, "weight_sync_path": "load_weights"},
    ],
    ids=["tp1", "tp2", "pp2", "tp2 pp2", "tp2 through the loader"],
)
def test_every_dense_training_layout_reaches_this_rollout_layout(dense, rollout) -> None:
    check_all(*dense, rollout)


@pytest.mark.parametrize(
    "rollout",
    [
        {"tp": 2},
        {"tp": 2, "enable_expert_parallel": True},
        pytest.param({"pp": 2}, marks=pytest.mark.slow),
    ],
    ids=["tp2", "tp2 expert parallel", "pp2"],
)
def test_every_training_layout_of_experts_reaches_this_rollout_layout(mixture, rollout) -> None:
    check_all(*mixture, rollout)


@pytest.mark.parametrize(
    "rollout", [pytest.param({"tp": 2}, marks=pytest.mark.slow), {"pp": 2}], ids=["tp2", "pp2"]
)
def test_tied_embeddings_arrive_on_every_stage(tmp_path, rollout) -> None:
    save_tiny_llama(tmp_path / "init", tied=True)
    check_all(tmp_path, {"pp2": train(tmp_path, "pp2", {"pp": 2})}, rollout)


@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_biases_and_norms_of_qwen_arrive(tmp_path, family) -> None:
    sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 256}
    tiny_models.save_model(tmp_path / "init", family, **sizes)
    save_character_tokenizer(tmp_path / "init")
    done = {"tp2 pp2 vpp2": train(tmp_path, "tp2 pp2 vpp2", DENSE["tp2 pp2 vpp2"])}
    check_all(tmp_path, done, {"tp": 2})


@pytest.mark.slow
def test_mixtral_arrives(tmp_path) -> None:
    save_tiny_moe(tmp_path / "init", "mixtral")
    done = {"tp2 ep2": train(tmp_path, "tp2 ep2", MIXTURE["tp2 ep2"])}
    check_all(tmp_path, done, {"tp": 2})
