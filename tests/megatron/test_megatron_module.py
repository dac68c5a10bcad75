"""What a subclass of MegatronModule gets: training, scores, weights, offloading."""

import logging
import math
import threading
from logging.handlers import BufferingHandler

import pytest
import torch
import transformers

from chatlearn_vllm.algorithms.policy import policy_loss
from chatlearn_vllm.config.schema import MismatchStopConfig
from chatlearn_vllm.engines.megatron.background_writer import BackgroundWriter
from chatlearn_vllm.modules.megatron_module import MegatronModule
from chatlearn_vllm.modules.mismatch_guard import MismatchError
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.weight_sync.links import colocated
from chatlearn_vllm.weight_sync.transport import OpenedExport
from tests.megatron import tiny_models
from tests.megatron.tiny_modules import assert_same_metrics, built


class Scorer(MegatronModule):
    def model_provider(self, pre_process=True, post_process=True, vp_stage=None):
        return super().model_provider(pre_process, post_process, vp_stage)

    def forward_step(self, data, iteration=0):
        return {**data, "ref_logprobs": self.compute_logprobs(data)}


class Trainer(Scorer):
    """Clipped policy loss with an entropy bonus."""

    def loss(self, batch, logprobs, entropy):
        mask = batch["loss_mask"][:, 1:]
        loss, sums = policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], mask)
        return loss - 0.01 * entropy, sums


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def one_rank_metrics(ranks, llama):
    """Two optimizer steps on 4 of 8 rows each, in micro-batches of 4."""
    return ranks[1].run(train, llama, train_micro_batch_size=4)[0]


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {"train_micro_batch_size": 1}),
        (2, {"train_micro_batch_size": 1}),
        (2, {"train_micro_batch_size": 2}),
        (2, {"tp": 2, "train_micro_batch_size": 2}),
        (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
        (4, {"train_micro_batch_size": 1}),
        (1, {"max_tokens_per_micro_batch": 44}),
        (2, {"max_tokens_per_micro_batch": 44, "sequence_packing": True}),
        (4, {"pp": 2, "tp": 2, "max_tokens_per_micro_batch": 24, "sequence_packing": True}),
    ],
)
def test_metrics_depend_neither_on_micro_batches_nor_on_ranks(
    ranks, llama, one_rank_metrics, world_size, settings
):
    # rows have different numbers of tokens: a mean of means would show
    for metrics in ranks[world_size].run(train, llama, **settings):
        assert_same_metrics(metrics, one_rank_metrics)


def test_sequence_mean_depends_neither_on_micro_batches_nor_on_ranks(ranks, llama):
    (expected,) = ranks[1].run(train, llama, train_micro_batch_size=4, loss_agg="seq-mean")
    (found, _) = ranks[2].run(train, llama, train_micro_batch_size=1, loss_agg="seq-mean")
    (token_mean,) = ranks[1].run(train, llama)
    for step in (0, 1):
        for name in ("loss", "grad_norm", "clipped"):
            assert found[step][name] == pytest.approx(expected[step][name], rel=2e-4, abs=2e-6)
    assert expected[0]["grad_norm"] != pytest.approx(token_mean[0]["grad_norm"], rel=1e-2)


def test_token_sums_are_divided_by_the_longest_response(ranks, llama, one_rank_metrics):
    settings = {"loss_agg": "seq-mean-token-sum-norm", "max_new_tokens": 20}
    token_mean = one_rank_metrics[0]
    for found in ranks[2].run(train, llama, train_micro_batch_size=1, **settings):
        expected = token_mean["loss"] * token_mean["tokens"] / (4 * 20)  # of four rows
        assert found[0]["loss"] == pytest.approx(expected, rel=2e-4)


def test_first_step_compares_the_rollout_with_the_weights_before_it(ranks, llama):
    (metrics,) = ranks[1].run(train, llama, rollout_error=0.25, num_training_epoch=2)
    assert len(metrics) == 4
    for step in metrics:
        assert step["logprob_abs_diff_mean"] == pytest.approx(0.25, abs=1e-5)
        assert step["logprob_abs_diff_max"] == pytest.approx(0.25, abs=1e-5)
        # The rollout's probabilities are too high by 0.25, so the trainer's ratio is exp(-0.25).
        assert step["rollout_kl"] == pytest.approx(math.exp(-0.25) - 1 + 0.25, abs=1e-5)
        assert step["rollout_clip_fraction"] == 1.0
    # old logprobs are this model's, so the first ratio is 1 whatever the rollout sent
    assert metrics[0]["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics[3]["ratio"] != pytest.approx(1.0, abs=1e-6)
    assert metrics[0]["tokens"] == tiny_models.batch()["loss_mask"][:4].sum()


def test_a_rollout_without_logprobs_is_learnt_from_like_others(ranks, llama):
    (expected,) = ranks[1].run(train, llama)
    (found,) = ranks[1].run(train, llama, sends_logprobs=False)
    assert "logprob_abs_diff_mean" in expected[0] and "logprob_abs_diff_mean" not in found[0]
    assert_same_metrics(
        found, [{name: step[name] for name in found[0]} for step in expected], rel=1e-6
    )


def test_the_comparison_does_not_depend_on_the_ranks(ranks, llama):
    # An error that differs by token, and rows of different lengths: a mean of means would show.
    error = torch.linspace(-0.4, 0.3, 8 * 23).view(8, 23).tolist()
    (expected,) = ranks[1].run(train, llama, rollout_error=error)
    names = (
        "logprob_abs_diff_mean", "logprob_abs_diff_max", "rollout_kl", "rollout_clip_fraction"
    )  # fmt: skip
    assert 0 < expected[0]["rollout_clip_fraction"] < 1
    for found in ranks[2].run(train, llama, rollout_error=error):
        for name in names:
            assert found[0][name] == pytest.approx(expected[0][name], rel=1e-5), name


def test_the_comparison_leaves_out_what_earlier_weights_sampled(ranks, llama):
    # Rows 0 to 3 are of an earlier episode; their error would show, on whichever rank they are.
    earlier = [[0.3]] * 4 + [[0.01]] * 4
    versions = [1] * 4 + [2] * 4
    for world_size in (1, 2):
        for found in ranks[world_size].run(
            train, llama, rollout_error=earlier, weight_version=versions
        ):
            assert found[0]["logprob_abs_diff_max"] == pytest.approx(0.01, abs=1e-5)
            assert found[0]["logprob_abs_diff_mean"] == pytest.approx(0.01, abs=1e-5)
    # Of a partial rollout some tokens: here those up to position 8.
    error = torch.where(torch.arange(23) < 8, 0.3, 0.01).expand(8, 23).tolist()
    tokens = torch.where(torch.arange(23) < 8, 1, 2).expand(8, 23).tolist()
    (found,) = ranks[1].run(
        train, llama, rollout_error=error, weight_version=[2] * 8, token_versions=tokens
    )
    assert found[0]["logprob_abs_diff_max"] == pytest.approx(0.01, abs=1e-5)


def test_the_first_rank_warns_once_and_training_goes_on(ranks, llama):
    first, second = ranks[2].run(warnings_of_two_episodes, llama)
    assert [message.split("=")[0] for message in first] == [
        f"trainer: episode 1, rollouts of weight version None: {name}"
        for name in ("logprob_abs_diff_mean", "rollout_kl", "rollout_clip_fraction")
    ]
    assert second == []


@pytest.mark.parametrize(("world_size", "settings"), [(2, {}), (4, {"tp": 2, "pp": 2})])
def test_all_ranks_stop_before_the_first_step(ranks, llama, world_size, settings):
    stop = {"mismatch_stop": MismatchStopConfig(rollout_kl=0.01), "rollout_error": 0.25}
    for message, is_unchanged in ranks[world_size].run(refused_training, llama, **stop, **settings):
        assert message.startswith("episode 3, rollouts of weight version 3: rollout_kl=0.0288 is")
        assert is_unchanged


def test_a_probability_that_is_not_finite_stops_whatever_the_levels(ranks, llama):
    error = torch.zeros(8, 23)
    error[5, 5:7] = float("nan")  # response tokens; the first rank has rows 0, 1, 4, 5
    error[7, 5] = float("inf")
    error[0, 0] = float("nan")  # of the prompt
    for message, is_unchanged in ranks[2].run(refused_training, llama, error.tolist()):
        assert "NaN or infinite (3 of the rollout's, 0 of the trainer's)" in message
        assert "first in row 3 of data parallel rank 0" in message
        assert is_unchanged


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {}),
        (4, {"tp": 2, "pp": 2}),
        (1, {"max_tokens_per_micro_batch": 44}),
        (4, {"tp": 2, "pp": 2, "max_tokens_per_micro_batch": 44, "sequence_packing": True}),
    ],
)
def test_scores_are_those_of_hugging_face_at_the_sampling_temperature(
    ranks, llama, world_size, settings
):
    batch = tiny_models.batch(rows=5)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        log_p = (model(batch["all_tokens"]).logits / 0.6).log_softmax(-1)[:, :-1]
    expected = log_p.gather(2, batch["all_tokens"][:, 1:, None])[..., 0]
    expected = expected * batch["loss_mask"][:, 1:]
    for found in ranks[world_size].run(score, llama, temperature=0.6, **settings):
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert (found - expected).abs().max() < 1e-5


def test_a_last_step_takes_what_is_left(ranks, llama):
    (metrics,) = ranks[1].run(train, llama, rows=7, train_micro_batch_size=2)
    assert len(metrics) == 2
    assert metrics[1]["tokens"] == tiny_models.batch(7)["loss_mask"][4:].sum()


def test_no_rows_make_no_step(ranks, llama):
    ((metrics, next_lr),) = ranks[1].run(train_on_nothing, llama)
    assert metrics == []
    assert next_lr == pytest.approx(0.5e-3)  # the first of two steps of the warm-up to 1e-3


def test_unequal_shards_are_refused(ranks, llama):
    for message in ranks[2].run(error_of_unequal_shards, llama):
        assert "equally many" in message


def test_local_parameters_and_weight_layout_have_the_same_names(ranks, llama):
    for names, layouts in ranks[4].run(parameters_and_layouts, llama, tp=2, pp=2):
        assert names == layouts
    stages = ranks[4].run(parameters_and_layouts, llama, tp=2, pp=2)
    assert "decoder.layers.0.mlp.linear_fc1.weight" in stages[0][0]
    assert "decoder.layers.2.mlp.linear_fc1.weight" in stages[3][0]


def test_offloading_follows_the_yaml(ranks, llama):
    (nothing,) = ranks[1].run(bytes_left_after_offload, llama)
    (weights,) = ranks[1].run(bytes_left_after_offload, llama, offload_weights=True)
    assert nothing > 0
    assert weights == 0


def test_resume_through_the_module(ranks, llama, tmp_path):
    settings = {"save": str(tmp_path / "checkpoints")}
    (expected,) = ranks[1].run(train_twice, llama, **settings)
    (found,) = ranks[1].run(train_after_resume, llama, **settings)
    for step in (0, 1):
        assert found[step] == pytest.approx(expected[step], rel=1e-5, abs=1e-7)


def test_a_checkpoint_in_the_background_is_there_when_it_is_finished(ranks, llama, tmp_path):
    settings = {"save": str(tmp_path), "async_save": True}
    assert ranks[1].run(written_before_and_after_finish, llama, **settings) == [(False, True)]
    assert (tmp_path / "latest").read_text() == "iter_0000001\n"


def test_exported_weights_are_the_live_ones(ranks, llama):
    assert ranks[2].run(exported_equal_live, llama, tp=2) == [(True, "RuntimeError")] * 2


def rollout(module, rows=8, rollout_error=0.0, weight_version=None, token_versions=None):
    """This rank's rows: of every group of 4 rows, which one step takes, each rank's share."""
    batch = tiny_models.batch(rows)
    batch["advantages"] = torch.linspace(-1.0, 1.5, rows)
    size = module.data_parallel_size
    per_step = 4 // size
    mine = [row for row in range(rows) if row % 4 // per_step == module.data_parallel_rank]
    batch = {key: value[mine] for key, value in batch.items()}
    error = torch.tensor(rollout_error).expand(rows, batch["all_tokens"].size(1) - 1)[mine]
    batch["logprobs"] = module.compute_logprobs(batch) + error
    if weight_version is not None:
        batch["weight_version"] = torch.tensor(weight_version)[mine]
    if token_versions is not None:
        batch["token_versions"] = torch.tensor(token_versions)[mine]
    return batch


def train(
    path, rows=8, rollout_error=0.0, weight_version=None, token_versions=None, sends_logprobs=True,
    **settings,
):  # fmt: skip
    with built(Trainer, path, **settings) as module:
        batch = rollout(module, rows, rollout_error, weight_version, token_versions)
        if not sends_logprobs:
            del batch["logprobs"]
        return module.train(batch, iteration=0)


def train_on_nothing(path):
    """What `train` returns of no rows, and the learning rate of the first step after it."""
    with built(Trainer, path, lr_warmup_iters=2) as module:
        batch = rollout(module)
        nothing = {key: value[:0] for key, value in batch.items()}
        return module.train(nothing, iteration=1), module.train(batch, iteration=2)[0]["lr"]


def warnings_of_two_episodes(path):
    """What the default levels make the module log about rollouts that are off by 0.25."""
    handler = BufferingHandler(capacity=100)
    handler.setLevel(logging.WARNING)
    module_logger = get_logger("chatlearn_vllm.modules.megatron_module")
    module_logger.addHandler(handler)
    with built(Trainer, path) as module:
        for episode in (1, 2):
            assert module.train(rollout(module, rollout_error=0.25), episode)
    module_logger.removeHandler(handler)
    return [record.getMessage() for record in handler.buffer]


def refused_training(path, rollout_error=0.0, **settings):
    """What `train` raised in episode 3, and whether the weights are as before."""
    with built(Trainer, path, **settings) as module:
        before = {name: tensor.clone() for name, tensor in module.local_parameters().items()}
        batch = rollout(module, rollout_error=rollout_error)
        batch["weight_version"] = torch.full((len(batch["all_tokens"]),), 3)
        try:
            module.train(batch, iteration=3)
        except MismatchError as error:
            after = module.local_parameters()
            return str(error), all(torch.equal(before[name], after[name]) for name in before)


def train_twice(path, **settings):
    """Metrics of a second call, before which a checkpoint was saved."""
    with built(Trainer, path, **settings) as module:
        module.train(rollout(module))
        module.save_checkpoint(1)
        return module.train(rollout(module))


def train_after_resume(path, **settings):
    with built(Trainer, path, **settings) as module:
        assert module.load_checkpoint() == 1
        return module.train(rollout(module))


def written_before_and_after_finish(path, **settings):
    released, write_file = threading.Event(), BackgroundWriter._write_file

    def held_back(self, number):
        assert released.wait(30)
        return write_file(self, number)

    with built(Trainer, path, **settings) as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackgroundWriter, "_write_file", held_back)
        module.save_checkpoint(1)
        before = module.is_checkpoint_written()
        released.set()
        module.finish_checkpoint()
        return before, module.is_checkpoint_written()


def score(path, **settings):
    with built(Scorer, path, trainable=False, **settings) as module:
        return module.forward_step(tiny_models.batch(rows=5))["ref_logprobs"]


def error_of_unequal_shards(path):
    with built(Trainer, path) as module:
        rows = 4 + 2 * module.data_parallel_rank
        try:
            module.train(tiny_models.batch(rows))
        except ValueError as error:
            return str(error)


def parameters_and_layouts(path, **settings):
    with built(Trainer, path, **settings) as module:
        shapes = {name: tuple(p.shape) for name, p in module.local_parameters().items()}
        layouts = module.weight_shards().rank_layouts(module.rank)
        return shapes, {layout.name: layout.shape for layout in layouts}


def exported_equal_live(path, **settings):
    with built(Trainer, path, offload_weights=True, **settings) as module:
        module.train(rollout(module))
        sources = module.weight_shards()
        links = colocated(sources.num_ranks, sources.num_ranks, sources.num_ranks)
        module.plan_weight_sync(sources, sources, links, {})
        opened = OpenedExport(module.export_weights()).tensors
        live = module.local_parameters()
        is_equal = opened.keys() == live.keys() and all(
            torch.equal(opened[name], live[name]) for name in live
        )
        module.offload()
        try:
            module.export_weights()
        except RuntimeError as error:
            return is_equal, type(error).__name__


def bytes_left_after_offload(path, **settings):
    with built(Trainer, path, **settings) as module:
        module.offload()
        left = sum(p.untyped_storage().nbytes() for p in module.local_parameters().values())
        module.onload()
        return left
