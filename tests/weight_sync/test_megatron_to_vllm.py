"""Do trained weights arrive bitwise in live vLLM parameters, for every pair of parallel layouts?

Real megatron-core ranks take an optimizer step and write a Hugging Face checkpoint. Real vLLM
ranks pull the weights, and are compared with what vLLM's own loader makes of that checkpoint.
"""

import gc
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from chatlearn_vllm.config import ModelArgs
from tests.helpers.engines import policy_job
from tests.helpers.ranks import Ranks
from tests.helpers.tiny_llama import save_tiny_llama

LAYOUTS = {"tp1 pp1": (1, 1), "tp2 pp1": (2, 1), "tp1 pp2": (1, 2), "tp2 pp2": (2, 2)}
PROMPTS = [[5, 6, 7, 8], [20, 21], [30, 31, 32, 33, 34, 35, 36]]


def train_and_export(model_dir: Path, save_dir: Path, tp: int, pp: int):
    """On a training rank: one optimizer step, then layouts and export; keeps the engine alive."""
    from tests.megatron import tiny_models

    settings = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    args = ModelArgs(load=str(model_dir), lr=1e-2, clip_grad=1.0, dtype="float32", **settings)
    engine = tiny_models.MegatronEngine(args, trainable=True)
    engine.build()
    tiny_models.train(engine, steps=1)
    engine.save_hf(save_dir)
    from chatlearn_vllm.weight_sync.transport import export_tensors

    layouts = [layout for layout, _ in engine.laid_out_parameters()]
    export = export_tensors({name: p.data for name, p in engine.named_parameters()})
    engine.shutdown()
    return layouts, export


_policy = None


def build_policy(job_dir: Path, model_dir: Path, tp: int, pp: int) -> str:
    """On a rollout rank: build the engine with dummy weights."""
    global _policy
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from chatlearn_vllm.modules.vllm_module import VLLMModule

    class Policy(VLLMModule):
        build_dataset = model_provider = _add_request = decode_internal = None

        def setup(self):
            pass

        def forward_step(self, data, iteration=0):
            return self.execute_step(data)

    directory = job_dir / os.environ["RANK"]
    directory.mkdir(parents=True)
    job = policy_job(
        directory, model_dir, num_gpu=tp * pp,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
    )  # fmt: skip
    _policy = Policy("policy", job)
    _policy.init()
    _policy.model_setup()
    return _policy.engine_state()


def pull(sources, exports, version: int):
    """On a rollout rank: one weight sync, then greedy answers."""
    needed = _policy.plan_weight_sync(sources, [])
    num_bytes = _policy.import_weights(version, *(exports[rank] for rank in needed))
    pulled = {name: p.detach().clone() for name, p in _policy.engine.parameters().items()}
    return num_bytes, pulled, greedy()


def greedy() -> list[list[int]]:
    for row, ids in enumerate(PROMPTS):
        _policy.engine.add_request(
            str(row), None, ids, {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
        )
    return [list(output.outputs[0].token_ids) for output in _policy.engine.run()]


def sample() -> list[list[int]]:
    """On a rollout rank: sampled answers, its process's random generator unlike the others'."""
    torch.manual_seed(int(os.environ["RANK"]))
    for row, ids in enumerate(PROMPTS):
        sampling = {"temperature": 1.0, "max_tokens": 8, "seed": row, "n": 2, "ignore_eos": True}
        _policy.engine.add_request(str(row), None, ids, sampling)
    outputs = _policy.engine.run()
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


def drop_engine() -> bool:
    """On a rollout rank: whether torch.distributed outlives the engine."""
    global _policy
    _policy.shutdown()
    _policy = None
    gc.collect()
    return torch.distributed.is_initialized()


def load_with_vllm(checkpoint: Path) -> dict[str, torch.Tensor]:
    """On a rollout rank: the parameters that vLLM's own loader makes of a checkpoint."""
    with torch.no_grad():
        for parameter in _policy.engine.parameters().values():
            parameter.fill_(float("nan"))
        _policy.model.load_weights(load_file(checkpoint / "model.safetensors").items())
    return {name: p.detach().clone() for name, p in _policy.engine.parameters().items()}


def hugging_face_greedy(checkpoint: Path) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).float().eval()
    model.generation_config.eos_token_id = None
    answers = []
    for ids in PROMPTS:
        with torch.no_grad():
            tokens = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        answers.append(tokens[0, len(ids) :].tolist())
    return answers


def trainings(root: Path, tied: bool, layouts) -> dict:
    """Per training layout: ranks' layouts, their exports, checkpoint, Hugging Face's answers."""
    save_tiny_llama(root / "init", tied=tied)
    done = {}
    for name in layouts:
        tp, pp = LAYOUTS[name]
        ranks = Ranks(tp * pp)
        try:
            per_rank = ranks.run(train_and_export, root / "init", root / name, tp, pp)
        finally:
            ranks.close()
        sources = {rank: layouts for rank, (layouts, _) in enumerate(per_rank)}
        exports = {rank: export for rank, (_, export) in enumerate(per_rank)}
        done[name] = sources, exports, root / name, hugging_face_greedy(root / name)
    return done


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    root = tmp_path_factory.mktemp("untied")
    return root, trainings(root, False, LAYOUTS)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    root = tmp_path_factory.mktemp("tied")
    return root, trainings(root, True, ["tp1 pp2"])


def check_all(root: Path, done: dict, rollout: str) -> None:
    tp, pp = LAYOUTS[rollout]
    ranks = Ranks(tp * pp)
    try:
        states = ranks.run(build_policy, root / f"jobs {rollout}", root / "init", tp, pp)
        assert set(states) == {"DUMMY"}
        for version, (train, (sources, exports, checkpoint, answers)) in enumerate(done.items(), 1):
            pulled = ranks.run(pull, sources, exports, version)
            expected = ranks.run(load_with_vllm, checkpoint)
            for (num_bytes, got, tokens), want in zip(pulled, expected, strict=True):
                assert got.keys() == want.keys()
                for name in want:
                    rows = want[name].isfinite().flatten(1).all(1) if want[name].dim() > 1 else ...
                    assert torch.equal(got[name][rows], want[name][rows]), f"{train}: {name}"
                    assert got[name].isfinite().all(), f"{train}: {name}"
                assert num_bytes > 0
                assert tokens == answers, train
        sampled = ranks.run(sample)
        assert all(tokens == sampled[0] for tokens in sampled)
        # vLLM 0.32 would end it for everybody in the process.
        assert all(ranks.run(drop_engine))
    finally:
        ranks.close()


@pytest.mark.parametrize("rollout", LAYOUTS)
def test_every_training_layout_reaches_this_rollout_layout(untied, rollout) -> None:
    check_all(*untied, rollout)


@pytest.mark.parametrize("rollout", ["tp2 pp1", "tp1 pp2"])
def test_tied_embeddings_arrive_on_every_stage(tied, rollout) -> None:
    check_all(*tied, rollout)
