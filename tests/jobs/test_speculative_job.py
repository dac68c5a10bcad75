"""Does a GRPO job draft, say what it gains, and stop where that is too little?"""

import pytest
import torch

from tests.helpers.tiny_llama import save_tiny_llama
from tests.jobs.test_grpo_job import run, write_job

pytestmark = pytest.mark.slow


def save_draft(directory, model) -> None:
    """The model with a little noise: it agrees on most tokens."""
    directory.mkdir()
    draft = save_tiny_llama(directory)
    torch.manual_seed(1)
    with torch.no_grad():
        for mine, its in zip(draft.parameters(), model.parameters(), strict=True):
            mine.copy_(its + 0.02 * its.std() * torch.randn_like(its))
    draft.save_pretrained(directory)


def test_two_ranks_draft_alike_and_stop_together(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    save_draft(tmp_path / "draft", save_tiny_llama(tmp_path / "model"))
    job = write_job(
        tmp_path, tmp_path / "model", num_episode=4, sample_per_episode=16,
        policy={
            "tensor_model_parallel_size": 2, "seq_length": 96, "max_new_tokens": 80, "n": 2,
            "ignore_eos": True, "max_num_seqs": 4, "speculative_model": str(tmp_path / "draft"),
            "num_speculative_tokens": 2, "speculative_min_gain": 1000.0,
        },
        trainer={"seq_length": 96, "max_new_tokens": 80, "lr": 1e-4},
        colocation=["policy,policy_trainer"],
    )  # fmt: skip
    episodes = run(job)[1:]
    for metrics in episodes:
        # Log-probabilities with drafts are those that the trainer computes, on both ranks.
        assert metrics["train/logprob_abs_diff_mean"] < 1e-4
        assert metrics["train/logprob_abs_diff_max"] < 1e-3
        assert 0 < metrics["rollout/spec_gain"] < 1000
        assert 0.1 < metrics["rollout/spec_acceptance_rate"] <= 1
        assert 1 < metrics["rollout/spec_accepted_length"] <= 3
        assert ("eval/spec_acceptance_rate" in metrics) == (metrics["episode"] < 2)
    # Two rollouts say that it is too little; the others draft in a few steps, to compare.
    assert [metrics["rollout/spec_enabled"] for metrics in episodes] == [1, 1, 0, 0]
    drafts = [metrics["rollout/spec_drafts"] for metrics in episodes]
    assert max(drafts[2:]) < 0.7 * min(drafts[:2])
