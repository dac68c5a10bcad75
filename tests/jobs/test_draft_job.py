"""Does a draft that is trained with the policy draft better? Real Ray, vLLM and megatron-core."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from chatlearn_vllm import DraftModule, Evaluator, GRPOEngine
from chatlearn_vllm.observability.metrics import read_metrics
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.job_modules import CountingPolicy, DigitReward
from tests.helpers.tiny_llama import save_tiny_llama
from tests.jobs.test_grpo_job import PROMPTS, write_job
from tests.jobs.test_grpo_resume import without_times

DRAFT_BYTES = 4 * (2 * 100 * 64 + 64 + 256 * 64 + 64 * 128 + 2 * 96 * 64 + 64 * 96 + 2 * 64)


class NotingPolicy(CountingPolicy):
    """Writes down what drafts in each rollout, in Hugging Face's terms."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Note and answer."""
        draft, tensors = self.engine.draft, {}
        if self.world_size > 1:  # each rank has a part
            return super().generate(*args, **kwargs)
        parameters = draft.parameters()
        for layout in draft.shards(1).rank_layouts(0):
            for block in layout.blocks:
                rows = slice(*block.local[0])
                tensors[block.tensor] = parameters[layout.name].detach()[rows].clone()
        torch.save(tensors, self.runtime_args.run_dir / f"drafts_{draft.state.version}.pt")
        return super().generate(*args, **kwargs)


class NotingDraft(DraftModule):
    """Writes down what it has learnt."""

    def train(self, data: Any, iteration: int = 0) -> Any:
        """Train and note."""
        metrics = super().train(data, iteration)
        self.save_hf(self.runtime_args.run_dir / f"draft_{iteration}")
        return metrics


class NotingTrainer(PolicyTrainer):
    """Writes down what it has learnt."""

    def train(self, data: Any, iteration: int = 0) -> Any:
        """Train and note."""
        metrics = super().train(data, iteration)
        self.save_hf(self.runtime_args.run_dir / f"policy_{iteration}")
        return metrics


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A policy, the random draft that training starts from, and another one."""
    root = tmp_path_factory.mktemp("models")
    for name, seed, layers in (("policy", 0, 2), ("start", 1, 1), ("other", 2, 1)):
        (root / name).mkdir()
        save_tiny_llama(root / name, seed=seed, num_hidden_layers=layers)
    return root


def draft_job(
    directory: Path, models: Path, drafting: dict[str, Any] | None = None, *, tp: int = 1,
    **runtime: Any,
):  # fmt: skip
    directory.mkdir(exist_ok=True)
    drafting = {"method": "draft_model", "model": str(models / "other"), **(drafting or {})}
    return write_job(
        directory, models / "policy", num_gpu=tp,
        policy={
            "tensor_model_parallel_size": tp,
            "speculative_config": drafting | {"num_speculative_tokens": 3}, "temperature": 0.1,
            "ignore_eos": True, "n": 8,
        },
        trainer={"lr": 1e-6, "temperature": 0.1},
        draft={"load": str(models / "start"), "lr": 5e-3, "temperature": 0.1},
        colocation=["policy,policy_trainer,draft_trainer"],
        num_training_epoch=6, train_micro_batch_size=4, train_global_batch_size=8, **runtime,
    )  # fmt: skip


def run(job) -> list[dict[str, float]]:
    policy, reward = NotingPolicy("policy", job), DigitReward("reward", job)
    draft_trainer = NotingDraft("draft_trainer", job)
    trainer = NotingTrainer("policy_trainer", job)
    engine = GRPOEngine(policy, None, reward, trainer, draft_trainer=draft_trainer)
    engine.set_dataset(PROMPTS[:4])
    engine.set_evaluator(Evaluator(policy, reward, PROMPTS[:4]))
    return engine.learn()


def test_a_draft_that_is_trained_with_the_policy_is_synced_with_it(models, tmp_path) -> None:
    history = run(draft_job(tmp_path, models, num_episode=3))
    run_dir = tmp_path / "run"
    assert [metrics["sync/draft_bytes"] for metrics in history] == [DRAFT_BYTES] * 4
    episodes = history[1:]
    for number, metrics in enumerate(episodes, 1):
        assert metrics["rollout/draft_version"] == metrics["rollout/weight_version"] == number
        # The log-probabilities are the policy's, whatever drafts.
        assert metrics["train/logprob_abs_diff_mean"] < 1e-4
    # Each rollout drafts with what was learnt before it, first with what training starts from.
    for number, learnt in enumerate([models / "start", run_dir / "draft_1", run_dir / "draft_2"]):
        expected = load_file(learnt / "model.safetensors")
        drafts = torch.load(run_dir / f"drafts_{number + 1}.pt")
        assert all(torch.equal(drafts[name], expected[name]) for name in expected)
    losses = [metrics["draft_trainer/loss"] for metrics in episodes]
    assert losses == sorted(losses, reverse=True)
    assert episodes[2]["draft_trainer/kl"] < 0.5 * episodes[0]["draft_trainer/kl"]
    rates = [metrics["rollout/spec_acceptance_rate"] for metrics in episodes]
    assert rates[2] > rates[0] + 0.1
    # At temperature 0 the responses are those that the trained policy gives without drafts.
    answers = [json.loads(line) for line in (run_dir / "eval/episode_000003.jsonl").open()]
    assert history[3]["eval/spec_drafts"] > 0
    assert [answer["str_outputs"] for answer in answers] == greedy(
        run_dir / "policy_3", models / "policy", [answer["str_prompts"] for answer in answers]
    )


def greedy(directory: Path, tokenizer_dir: Path, prompts: list[str]) -> list[str]:
    """What transformers answers."""
    model = LlamaForCausalLM.from_pretrained(directory).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        answers.append(tokenizer.decode(made[0, ids.size(1) :], skip_special_tokens=True))
    return answers


@pytest.mark.slow
def test_a_resumed_job_goes_on_with_the_trained_draft(models, tmp_path) -> None:
    """On two ranks: trainers that are data parallel, an engine that is tensor parallel."""
    waits = {"draft_load_config": {"load_format": "dummy"}}  # for the first sync
    first = run(draft_job(tmp_path, models, waits, tp=2, num_episode=3, save_episode_interval=1))
    assert first[3]["rollout/spec_acceptance_rate"] > first[1]["rollout/spec_acceptance_rate"] + 0.1
    assert first[1]["sync/draft_bytes"] >= DRAFT_BYTES
    checkpoints = tmp_path / "run/checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {
        "driver", "policy_trainer", "draft_trainer",
    }  # fmt: skip
    job = draft_job(
        tmp_path, models, waits, tp=2, num_episode=3, save_episode_interval=1,
        enable_resume_training=True, load_data_checkpoint_iteration=2,
    )  # fmt: skip
    shutil.rmtree(tmp_path / "run/draft_2")
    again = run(job)
    assert [without_times(line) for line in again] == [without_times(first[3])]
    assert not (tmp_path / "run/draft_2").exists()
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["episode"] for line in lines] == [0, 1, 2, 3]
