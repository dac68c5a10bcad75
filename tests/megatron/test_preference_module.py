"""Is a policy on megatron-core trained on pairs of responses as plain torch would train it?"""

import pytest
import torch
import torch.nn.functional as F
import transformers

from chatlearn_vllm.data.batch import select
from chatlearn_vllm.modules.preference_module import PreferenceModule
from chatlearn_vllm.runtime.scatter import train_rows
from tests.helpers.random_shards import assemble
from tests.megatron import tiny_models
from tests.megatron.tiny_modules import assert_same_metrics, built, job

BETA = 0.3
GLOBAL_BATCH_SIZE = 8
"""Rows of an optimizer step: four pairs."""
STEP = {
    "sample_per_episode": 16, "train_global_batch_size": GLOBAL_BATCH_SIZE, "dpo_weight": BETA
}  # fmt: skip
PACKED = {"max_tokens_per_micro_batch": 96, "seq_length": 24, "sequence_packing": True}
LOSSES = {
    "dpo": {},
    "conservative dpo": {"label_smoothing": 0.2},
    "ipo": {"use_ipo": True},
}


class Trainer(PreferenceModule):
    def model_provider(self, *args, **kwargs):
        return super().model_provider(*args, **kwargs)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def one_rank_metrics(ranks, llama):
    """A step on four pairs and one on the two that are left, each in one micro-batch."""
    return ranks[1].run(train, llama, train_micro_batch_size=8)[0]


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_of_a_step_are_those_of_plain_torch(ranks, llama, kind):
    ((metrics, gradients, layouts),) = ranks[1].run(step, llama, **LOSSES[kind])

    expected, hf_gradients = step_in_plain_torch(llama, kind)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    expected_gradients = assemble(layouts, hf_gradients, torch.float32)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected_gradients[name]).norm()
        assert difference < 1e-4 * expected_gradients[name].norm(), name


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {"train_micro_batch_size": 1}),  # half a pair: rounded up
        (1, {"train_micro_batch_size": 4}),
        (1, {"train_micro_batch_size": 7}),  # three pairs, cut to two so that all are equal
        (2, {"train_micro_batch_size": 2}),
        (2, {"tp": 2, "train_micro_batch_size": 2}),
        (2, {"pp": 2, "train_micro_batch_size": 2}),
        (2, {"pp": 2, "virtual_pipeline_model_parallel_size": 2, "train_micro_batch_size": 8}),
        (4, {"tp": 2, "sequence_parallel": True, "train_micro_batch_size": 4}),
        (2, {"sequence_packing": True, "train_micro_batch_size": 4}),
        (1, {"max_tokens_per_micro_batch": 80, "seq_length": 24}),
        (2, {"max_tokens_per_micro_batch": 80, "seq_length": 24, "sequence_packing": True}),
    ],
)
def test_metrics_depend_neither_on_micro_batches_nor_on_ranks(
    ranks, llama, one_rank_metrics, world_size, settings
):
    assert [step["pairs"] for step in one_rank_metrics] == [4, 2]
    for metrics in ranks[world_size].run(train, llama, **settings):
        assert_same_metrics(metrics, one_rank_metrics, rel=1e-5)


def test_two_epochs_are_two_passes_over_the_same_pairs(ranks, llama):
    (expected,) = ranks[1].run(train, llama, num_calls=2)
    (found,) = ranks[1].run(train, llama, num_training_epoch=2)

    assert len(found) == 4
    for step in range(4):
        assert found[step] == pytest.approx(expected[step], rel=1e-5, abs=1e-7)
    assert found[2]["loss"] < found[0]["loss"]


def test_without_rows_there_is_no_step(ranks, llama):
    assert ranks[2].run(train, llama, rows=0) == [[], []]


def test_fillers_of_the_interleaved_schedule_do_not_count(ranks, llama, one_rank_metrics):
    """Two pairs fit into one micro-batch, and two virtual stages ask for two of them."""
    settings = {"pp": 2, "virtual_pipeline_model_parallel_size": 2, **PACKED}
    (expected,) = ranks[1].run(train, llama, rows=2)
    for found in ranks[2].run(train, llama, rows=2, **settings):
        assert found[0]["pairs"] == 1
        assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_tokens_per_micro_batch": 43, "seq_length": 22},
            "_batch=43 must be at least 2 x seq",
        ),
        ({"tp": 1}, "train_global_batch_size=8 must be a multiple of 16 = 2 x data parallel size"),
    ],
)
def test_what_would_part_the_rows_of_a_pair_is_refused_at_once(llama, settings, message):
    module = Trainer("trainer", job(llama, 8, **STEP, **settings))

    with pytest.raises(ValueError, match=message):
        module.init()


def pairs_of_rows(rows):
    """Rows of different lengths, chosen and rejected in turns, under another model's eyes."""
    batch = tiny_models.batch(rows)
    generator = torch.Generator().manual_seed(3)
    width = batch["all_tokens"].size(1) - 1
    batch["ref_logprobs"] = -8.0 + torch.randn(rows, width, generator=generator)
    return batch


def train(path, rows=12, num_calls=1, **settings):
    """Metrics of all steps on this rank's share of the rows."""
    with built(Trainer, path, **STEP, **settings) as module:
        mine = train_rows(
            rows, GLOBAL_BATCH_SIZE, module.data_parallel_rank, module.data_parallel_size
        )
        batch = select(pairs_of_rows(12), mine)
        return [metrics for _ in range(num_calls) for metrics in module.train(batch, iteration=1)]


def step(path, **settings):
    """Metrics, gradients and layouts of one step in two micro-batches."""
    with built(
        Trainer, path, **STEP, clip_grad=0.0, train_micro_batch_size=4, **settings
    ) as module:
        (metrics,) = module.train(pairs_of_rows(GLOBAL_BATCH_SIZE), iteration=1)
        gradients = {name: p.main_grad.clone() for name, p in module.engine.parameters.named()}
        return metrics, gradients, module.weight_shards().rank_layouts(0)


def step_in_plain_torch(path, kind):
    """The same with Hugging Face's model and autograd: metrics, gradients by name."""
    batch = pairs_of_rows(GLOBAL_BATCH_SIZE)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    log_p = model(batch["all_tokens"]).logits.log_softmax(-1)[:, :-1]
    of_tokens = log_p.gather(2, batch["all_tokens"][:, 1:, None])[..., 0] - batch["ref_logprobs"]
    ratios = (of_tokens * batch["loss_mask"][:, 1:]).sum(1)
    chosen, rejected = ratios[0::2], ratios[1::2]
    h = chosen - rejected
    if kind == "ipo":
        loss = (h - 1 / (2 * BETA)).square().mean()
    else:
        smoothing = LOSSES[kind].get("label_smoothing", 0.0)
        right, wrong = F.logsigmoid(BETA * h), F.logsigmoid(-BETA * h)
        loss = -((1 - smoothing) * right + smoothing * wrong).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    metrics = {
        "loss": loss.item(),
        "grad_norm": torch.stack([gradient.norm() for gradient in gradients.values()])
        .norm()
        .item(),
        "chosen_reward": BETA * chosen.mean().item(),
        "rejected_reward": BETA * rejected.mean().item(),
        "reward_margin": BETA * h.mean().item(),
        "accuracy": (h > 0).float().mean().item(),
        "pairs": 4.0,
    }
    return metrics, gradients
