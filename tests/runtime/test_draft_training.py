"""Is a draft that cannot be trained with its policy refused before anything starts?"""

from pathlib import Path
from typing import Any

import pytest

from chatlearn_vllm import DraftModule, GRPOEngine
from chatlearn_vllm.runtime.online_dpo_engine import OnlineDPOEngine
from examples.megatron.models.online_dpo_trainer import OnlineDPOTrainer
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.job_modules import CountingPolicy, DigitReward
from tests.helpers.tiny_llama import save_tiny_llama
from tests.jobs.test_grpo_job import write_job


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    sizes = {"policy": {}, "draft": {"num_hidden_layers": 1}, "wide": {"intermediate_size": 128}}
    for name, config in sizes.items():
        (root / name).mkdir()
        save_tiny_llama(root / name, **config)
    (root / "gpt").mkdir()
    (root / "gpt/config.json").write_text('{"model_type": "gpt2", "vocab_size": 100}')
    quantized = (
        (root / "draft/config.json")
        .read_text()
        .replace("{", '{"quantization_config": {"quant_method": "awq"},', 1)
    )
    (root / "awq").mkdir()
    (root / "awq/config.json").write_text(quantized)
    return root


def make_engine(
    directory: Path, models: Path, *, policy: dict | None = None, draft_class=DraftModule,
    trains=True, draft: dict | None = None, **drafting: Any,
) -> GRPOEngine:  # fmt: skip
    config = {"method": "draft_model", "model": str(models / "draft"), "num_speculative_tokens": 2}
    job = write_job(
        directory, models / "policy", num_gpu=1,
        policy={"speculative_config": config | drafting} | (policy or {}), trainer={},
        draft={"load": str(models / "draft")} | (draft or {}),
    )  # fmt: skip
    drafts = draft_class("draft_trainer", job) if trains else None
    return GRPOEngine(
        CountingPolicy("policy", job), None, DigitReward("reward", job),
        PolicyTrainer("policy_trainer", job), draft_trainer=drafts,
    )  # fmt: skip


def test_a_draft_of_the_same_shape_is_trained_before_the_policy(models, tmp_path) -> None:
    engine = make_engine(tmp_path, models)
    names = [module.name for module in engine.modules]
    assert names == ["policy_trainer", "draft_trainer", "reward", "policy"]
    assert [trainer.name for trainer in engine._targets] == ["draft_trainer", "policy_trainer"]


REFUSED = {
    "no drafts": (
        {"policy": {"speculative_config": None}},
        r"models.policy: speculative_config is not set.*set method: draft_model, model: .*/draft",
    ),
    "n-grams": (
        {"method": "ngram", "model": None},
        r"models.policy: speculative_config.method=ngram must be draft_model",
    ),
    "another engine": (
        {"policy": {"inference_engine": "transformers", "speculative_config": None}},
        r"models.policy: inference_engine=transformers .* set inference_engine: vllm",
    ),
    "another shape": (
        {"draft": {"load": "wide"}},
        r"another model than the one that is trained, models.draft_trainer: load=.*/wide "
        r"\(num_layers 1 instead of 2, ffn_hidden_size 96 instead of 128\)",
    ),
    "no layout": (
        {"model": "gpt"},
        r"speculative_config.model=.*/gpt: config.json: model_type='gpt2' has no weight layout",
    ),
    "quantised": (
        {"model": "awq"},
        r"the draft in speculative_config is quantised \(.*awq.*\).*quantization: fp8",
    ),
    "vocabularies": (
        {"use_heterogeneous_vocab": True},
        r"speculative_config.use_heterogeneous_vocab=True must be False",
    ),
    "a trainer of something else": (
        {"draft_class": PolicyTrainer},
        r"models.draft_trainer is a PolicyTrainer.*make it a DraftModule",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_named_with_a_way_out(models, tmp_path, case) -> None:
    arguments, message = REFUSED[case]
    arguments = {
        key: str(models / value) if key == "model" and value else value
        for key, value in arguments.items()
    }
    if "draft" in arguments:
        arguments["draft"] = {"load": str(models / arguments["draft"]["load"])}
    with pytest.raises(ValueError, match="draft_trainer: ") as error:
        make_engine(tmp_path, models, **arguments)
    assert error.match(f"(?s){message}")


def test_a_frozen_draft_that_waits_for_weights_is_refused(models, tmp_path) -> None:
    waits = {"draft_load_config": {"load_format": "dummy"}}
    make_engine(tmp_path, models, **waits)
    with pytest.raises(ValueError, match=r"load_format: dummy waits for .* draft_trainer"):
        make_engine(tmp_path, models, trains=False, **waits)


def test_pairs_are_spread_over_the_ranks_of_both_trainers(models, tmp_path) -> None:
    config = {"method": "draft_model", "model": str(models / "draft"), "num_speculative_tokens": 2}
    job = write_job(
        tmp_path, models / "policy", num_gpu=1, policy={"speculative_config": config},
        trainer={}, draft={"load": str(models / "draft")}, reference={},
        train_global_batch_size=8, sample_per_episode=24,
    )  # fmt: skip
    draft = job.models["draft_trainer"].model_copy(update={"num_gpu": 3})
    job = job.model_copy(update={"models": {**job.models, "draft_trainer": draft}})
    with pytest.raises(ValueError, match="3 data parallel ranks|multiple of 6"):
        OnlineDPOEngine(
            CountingPolicy("policy", job), PolicyReference("reference", job),
            DigitReward("reward", job), OnlineDPOTrainer("policy_trainer", job),
            draft_trainer=DraftModule("draft_trainer", job),
        )  # fmt: skip


@pytest.mark.parametrize("policy", [{}, {"speculative_config": None}])
def test_a_policy_may_draft_with_what_nobody_trains_or_not_at_all(models, tmp_path, policy) -> None:
    engine = make_engine(tmp_path, models, trains=False, policy=policy)
    assert [module.name for module in engine.modules] == ["policy_trainer", "reward", "policy"]
