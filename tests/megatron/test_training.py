"""The same steps give the same losses however the ranks are arranged."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from chatlearn_vllm.config import ModelArgs
from chatlearn_vllm.config.megatron_fields import IDLE
from chatlearn_vllm.engines.megatron import optimizer
from tests.megatron import tiny_models

LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2, sequence parallel": (2, {"tp": 2, "sequence_parallel": True}),
    "tp2, recompute": (2, {"tp": 2, "recompute_granularity": "full"}),
    "pp2": (2, {"pp": 2}),
    # with megatron-core's default p2p flags: gradient norms 10 to 100 times too large, no error
    "pp2, vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {}),
    "dp2, plain optimizer": (2, {"use_distributed_optimizer": False}),
    "dp2, overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2 pp2, sequence parallel": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "tp2 dp2, overlap, recompute": (
        4,
        {
            "tp": 2, "sequence_parallel": True, "recompute_granularity": "full",
            "overlap_grad_reduce": True, "overlap_param_gather": True,
        },
    ),
    "pp2 dp2, plain optimizer": (4, {"pp": 2, "use_distributed_optimizer": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied_qwen(tmp_path_factory):
    return tiny_models.save_model(
        tmp_path_factory.mktemp("qwen"), "qwen3", tie_word_embeddings=True
    )


@pytest.fixture(scope="module")
def one_rank_curve(ranks, llama):
    return ranks[1].run(loss_curve, llama)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_curve_does_not_depend_on_the_layout(ranks, llama, one_rank_curve, layout):
    world_size, settings = LAYOUTS[layout]
    for curve in ranks[world_size].run(loss_curve, llama, **settings):
        assert np.allclose(curve, one_rank_curve, rtol=1e-4), f"{curve}\n{one_rank_curve}"


def test_fields_that_are_told_to_do_nothing_change_no_step(ranks, llama, one_rank_curve):
    values = {"attention_backend": "flash", "attention_softmax_in_fp32": False,
              "cross_entropy_fusion_impl": "te", "transformer_impl": "local",
              "init_method_std": 0.5, "embedding_init_method_std": 0.5}  # fmt: skip
    fields = {name: values.get(name, True) for names in IDLE.values() for name in names}
    assert values.keys() < fields.keys()
    assert ranks[1].run(loss_curve, llama, transformer_args=fields) == [one_rank_curve]


def test_an_overflow_of_fp16_is_left_to_the_loss_scale(monkeypatch):
    """It starts so high that the first steps overflow; megatron-core's check would end the job."""
    checks = []

    def wrapped(config, ddp_config, chunk, **_):
        checks.append(ddp_config.check_for_nan_in_grad)

    monkeypatch.setattr(optimizer, "DistributedDataParallel", wrapped)
    for fp16 in (True, False):
        optimizer.wrap_data_parallel(SimpleNamespace(fp16=fp16), ["chunk"], ModelArgs())
    assert checks == [False, True]


def test_tied_embeddings_on_two_stages_train_as_on_one(ranks, tied_qwen):
    expected = ranks[1].run(loss_curve, tied_qwen)[0]
    for curve in ranks[4].run(loss_curve, tied_qwen, tp=2, pp=2, sequence_parallel=True):
        assert np.allclose(curve, expected, rtol=1e-4)


def test_bf16_follows_the_float32_curve(ranks, llama, one_rank_curve):
    settings = {"tp": 2, "sequence_parallel": True, "dtype": "bfloat16"}
    for curve in ranks[4].run(loss_curve, llama, **settings):
        assert np.allclose(np.array(curve)[:, 0], np.array(one_rank_curve)[:, 0], rtol=0.02)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_losses_do_not_depend_on_the_micro_batch_size(
    ranks, llama, one_rank_curve, micro_batch_size
):
    # megatron-core divides the loss in place by the number of micro-batches
    curve = ranks[1].run(loss_curve, llama, micro_batch_size=micro_batch_size)[0]
    assert np.allclose(curve, one_rank_curve, rtol=1e-4)


def test_norms_and_biases_are_spared_from_weight_decay(ranks, tmp_path):
    path = tiny_models.save_model(tmp_path, "qwen2")
    factors = ranks[2].run(decay_factors, path)[0]
    for name, factor in factors.items():
        is_spared = "layernorm" in name or name.endswith("bias")
        assert factor == pytest.approx(1.0 if is_spared else 1 - 0.01 * 0.5, abs=1e-6), name


def test_parameters_are_current_on_every_rank_right_after_a_step(ranks, llama):
    overlapping = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    expected = ranks[2].run(weights_after_a_step, llama)
    found = ranks[2].run(weights_after_a_step, llama, **overlapping)
    for name, weight in expected[0].items():
        assert torch.equal(found[0][name], found[1][name]), name
        assert torch.allclose(found[0][name], weight, atol=1e-6), name


def test_a_model_is_trained_without_dropout(ranks, llama):
    """Old log-probabilities are computed without; a first step would have ratios far from 1."""
    keys = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    assert ranks[1].run(dropouts, llama, **keys) == [(0.0, 0.0)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_decay_style": "linear"}, [0.005, 0.01, 0.005, 0.0]),
        ({"lr_decay_style": "linear", "min_lr": 0.002}, [0.005, 0.01, 0.006, 0.002]),
        # (1 + cos(pi / 3)) / 2 and (1 + cos(2 pi / 3)) / 2 of the way up from min_lr
        (
            {"lr_decay_style": "cosine", "lr_decay_iters": 5, "min_lr": 0.002},
            [0.005, 0.01, 0.008, 0.004],
        ),
    ],
)
def test_learning_rate_warms_up_from_the_first_update_on(ranks, llama, settings, expected):
    settings = {"lr_warmup_iters": 2, "lr_decay_iters": 4, **settings}
    rates = ranks[1].run(learning_rates, llama, **settings)[0]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (4, 4)),
        ({"recompute_granularity": "full"}, (8, 8)),
        ({"recompute_granularity": "full", "recompute_num_layers": 4}, (8, 8)),
        (
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 2,
            },
            (6, 6),
        ),
        ({"recompute_granularity": "selective"}, (4, 8)),
    ],
)
def test_backward_runs_again_what_is_recomputed(ranks, llama, settings, expected):
    (counts,) = ranks[1].run(forward_calls, llama, **settings)
    assert counts == expected


def test_ranks_of_a_sequence_parallel_layer_hold_half_of_the_tokens(ranks, llama):
    whole, same = ranks[2].run(tokens_of_the_first_norm, llama, tp=2)
    halves = ranks[2].run(tokens_of_the_first_norm, llama, tp=2, sequence_parallel=True)
    assert whole == same > 8
    assert halves == [-(-whole // 2)] * 2


def test_gradients_are_reduced_in_backward_where_that_overlaps(ranks, llama):
    in_backward, afterwards = ranks[2].run(reductions, llama, bucket_size=2000)[0]
    assert in_backward == 0 and afterwards > 0
    settings = {"overlap_grad_reduce": True, "bucket_size": 2000}
    in_backward, afterwards = ranks[2].run(reductions, llama, **settings)[0]
    assert in_backward > 1 and afterwards == 0


def test_skipped_updates_do_not_advance_the_learning_rate(ranks, llama):
    settings = {"lr_decay_style": "linear", "lr_warmup_iters": 2, "lr_decay_iters": 4}
    (metrics,) = ranks[1].run(metrics_with_skipped_updates, llama, **settings)
    assert [one["update_skipped"] for one in metrics] == [1, 1, 1, 0, 1, 0, 0]
    rates = [one["lr"] for one in metrics]
    assert rates == pytest.approx([0.005, 0.005, 0.005, 0.005, 0.01, 0.01, 0.005])


def test_all_parallel_groups_have_the_timeout_of_the_yaml(ranks, llama):
    found = ranks[4].run(group_timeouts, llama, tp=2, pp=2, distributed_timeout_minutes=7)
    assert {minutes for of_rank in found for minutes in of_rank} == {7}
    found = ranks[2].run(group_timeouts, llama, distributed_timeout_minutes=8)
    assert {minutes for of_rank in found for minutes in of_rank} == {8}


def test_a_policy_from_nothing_is_the_same_for_any_layout(ranks, llama, tmp_path):
    config = json.loads((llama / "config.json").read_text()) | {"initializer_range": 0.02}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = ranks[1].run(loss_curve, tmp_path, steps=2)[0]
    for settings in ({"tp": 2}, {"pp": 2}):
        found = ranks[2].run(loss_curve, tmp_path, steps=2, **settings)[0]
        assert np.allclose(found, expected, rtol=1e-4)
    other_seed = ranks[1].run(loss_curve, tmp_path, steps=2, seed=43)[0]
    assert not np.allclose(other_seed, expected, rtol=1e-3)
    # an untrained model of 99 tokens: the mean of -log p is about log 99
    num_tokens = float(tiny_models.batch()["loss_mask"].sum())
    assert expected[0][0] * 100 / num_tokens == pytest.approx(np.log(99), abs=0.1)


def test_random_states_follow_the_seed_and_differ_between_stages(ranks, llama):
    first = ranks[2].run(random_numbers, llama, pp=2)
    again = ranks[2].run(random_numbers, llama, pp=2)
    copies = ranks[2].run(random_numbers, llama)
    assert first == again
    assert first[0] != first[1]
    assert copies[0] == copies[1]


def test_building_an_engine_leaves_torch_cuda_as_it_was(ranks, llama):
    assert ranks[1].run(cuda_functions_are_kept, llama) == [True]


def loss_curve(path, steps=4, micro_batch_size=2, **settings):
    """[[loss, grad_norm], ...]."""
    with tiny_models.engine(path, **settings) as engine:
        return tiny_models.train(engine, steps, micro_batch_size)


def decay_factors(path):
    """By which factor each parameter shrinks in a step whose gradient is zero."""
    with tiny_models.engine(path, weight_decay=0.5, clip_grad=0.0) as engine:
        before = {name: p.detach().clone() for name, p in engine.parameters.named()}
        micro_batches = tiny_models.micro_batches(tiny_models.batch())
        engine.train_step(micro_batches, lambda b, logprobs, e: (logprobs.sum() * 0.0, {}))
        return {
            name: float(p.detach().norm() / before[name].norm())
            for name, p in engine.parameters.named()
        }


def weights_after_a_step(path, **settings):
    with tiny_models.engine(path, **settings) as engine:
        tiny_models.train(engine, 1)
        return {name: p.detach().clone() for name, p in engine.parameters.named()}


def dropouts(path, **settings):
    with tiny_models.engine(path, **settings) as engine:
        return engine.config.hidden_dropout, engine.config.attention_dropout


def learning_rates(path, **settings):
    with tiny_models.engine(path, **settings) as engine:
        micro_batches = tiny_models.micro_batches(tiny_models.batch())
        return [
            engine.train_step(micro_batches, tiny_models.negative_logprobs)[0]["lr"]
            for _ in range(4)
        ]


def metrics_with_skipped_updates(path, **settings):
    """Of seven steps, of which the first three and the fifth overflow."""
    with tiny_models.engine(path, **settings) as engine:
        micro_batches = tiny_models.micro_batches(tiny_models.batch())
        update, metrics = engine.optimizer.step, []
        for is_skipped in (True, True, True, False, True, False, False):
            engine.optimizer.step = (lambda: (False, None, None)) if is_skipped else update
            metrics.append(engine.train_step(micro_batches, tiny_models.negative_logprobs)[0])
        return metrics


def group_timeouts(path, **settings):
    """In minutes, of the groups that this rank shares with others."""
    with tiny_models.engine(path, trainable=False, **settings):
        groups = [
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_data_parallel_group(),
        ]
        options = [group._get_backend(torch.device("cpu")).options for group in groups]
        return [one._timeout.total_seconds() / 60 for one in options]


def forward_calls(path, **settings):
    """How often the four layers run their first norm and their core attention in a step."""
    counts = dict.fromkeys(("input_layernorm", "core_attention"), 0)
    with tiny_models.engine(path, **settings) as engine:
        for chunk in engine.chunks:
            for name, module in chunk.named_modules():
                part = name.rsplit(".", 1)[-1]
                if part in counts:
                    module.register_forward_hook(
                        lambda *_, part=part: counts.update({part: counts[part] + 1})
                    )
        engine.train_step([tiny_models.batch()], tiny_models.negative_logprobs)
    return tuple(counts.values())


def tokens_of_the_first_norm(path, **settings):
    """How many tokens of each row this rank normalizes in the first layer."""
    lengths = []
    with tiny_models.engine(path, trainable=False, **settings) as engine:
        norm = engine.chunks[0].decoder.layers[0].input_layernorm
        norm.register_forward_hook(lambda module, args, output: lengths.append(len(args[0])))
        engine.forward_only([tiny_models.batch()], lambda batch, logprobs, entropy: logprobs)
    (length,) = lengths
    return length


def reductions(path, **settings):
    """How many reductions of gradients a step starts within backward, and how many behind it."""
    within = []
    start = _ParamAndGradBucketGroup.start_grad_sync

    def noted(*args, **kwargs):
        within.append(torch._C._current_graph_task_id() != -1)
        return start(*args, **kwargs)

    with tiny_models.engine(path, **settings) as engine, pytest.MonkeyPatch.context() as patch:
        tiny_models.train(engine, 1)  # megatron-core counts its gradients first
        patch.setattr(_ParamAndGradBucketGroup, "start_grad_sync", noted)
        tiny_models.train(engine, 1)
    return within.count(True), within.count(False)


def random_numbers(path, **settings):
    with tiny_models.engine(path, trainable=False, **settings):
        return random.random(), float(np.random.random()), float(torch.rand(()))


def cuda_functions_are_kept(path):
    before = dict(vars(torch.cuda))
    with tiny_models.engine(path) as engine:
        tiny_models.train(engine, 1)
    return before == dict(vars(torch.cuda)) and torch.zeros(1).type() == "torch.FloatTensor"
