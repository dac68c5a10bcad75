"""Models with experts compute, train, save and resume alike however their ranks are arranged."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from tests.megatron import tiny_models

MODELS = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    # the first of two pipeline stages has no experts
    "half dense": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [0, 1]}),
}
LAYOUTS = {
    "one rank": (1, {}),
    "tp2": (2, {"tp": 2}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}),
    "tp2 etp1 ep2": (2, {"tp": 2, "etp": 1, "ep": 2}),
    "etp2": (2, {"etp": 2}),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}),
    "ep4": (4, {"ep": 4}),
    "pp2 vpp2 ep2": (4, {"pp": 2, "vpp": 2, "ep": 2}),
    "uneven pp2": (2, {"pp": 2, "first": 1, "last": 3}),
}
CORE = ("one rank", "tp2 ep2", "tp2 etp1 ep2", "pp2 vpp2 ep2")
"""Together they use every kind of parallelism; the others run with the slow tests."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {
        name: tiny_models.save_model(tmp_path_factory.mktemp("model"), family, **overrides)
        for name, (family, overrides) in MODELS.items()
    }


@pytest.fixture(scope="module")
def references(models):
    """What Hugging Face computes: logprobs [8, S-1] where loss_mask is 1, loss, gradient norm."""
    return {name: hugging_face(path) for name, path in models.items()}


@pytest.fixture(scope="module")
def one_rank_curves(ranks, models):
    """[loss, grad_norm] of five steps in one go."""
    return {name: ranks[1].run(curve, path, steps=5)[0] for name, path in models.items()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *[
            pytest.param("mixtral", layout, marks=[] if layout in CORE else pytest.mark.slow)
            for layout in LAYOUTS
        ],
        *[("qwen3_moe", layout) for layout in ("one rank", "tp2 ep2")],
        *[("half dense", layout) for layout in ("one rank", "pp2", "tp2 etp1 ep2")],
    ],
)
def test_logprobs_equal_those_of_hugging_face(ranks, models, references, name, layout):
    world_size, settings = LAYOUTS[layout]
    for rank, size, found in ranks[world_size].run(logprobs, models[name], **settings):
        assert (found - references[name]["logprobs"][rank::size]).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_equal_those_of_autograd(references, one_rank_curves, name):
    expected = [references[name]["loss"], references[name]["grad_norm"]]
    assert one_rank_curves[name][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "layout", "settings"),
    [
        *[
            pytest.param("mixtral", layout, {}, marks=[] if layout in CORE else pytest.mark.slow)
            for layout in LAYOUTS
            if layout != "one rank"
        ],
        ("qwen3_moe", "tp2 ep2", {"recompute_granularity": "full"}),
        ("qwen3_moe", "tp2 etp1 ep2", {"use_distributed_optimizer": False}),
        ("mixtral", "tp2 etp1", {"use_distributed_optimizer": False}),
        ("half dense", "pp2", {}),
        ("half dense", "pp2", {"use_distributed_optimizer": False}),
        ("half dense", "pp2 vpp2 ep2", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
)
def test_training_does_not_depend_on_the_layout(
    ranks, models, one_rank_curves, name, layout, settings
):
    world_size, sizes = LAYOUTS[layout]
    expected = one_rank_curves[name][:3]
    for found in ranks[world_size].run(curve, models[name], steps=3, **sizes, **settings):
        assert np.allclose(found, expected, rtol=1e-4), f"{found}\n{expected}"


def test_copies_of_an_expert_stay_equal(ranks, models):
    # each of the two tensor parallel ranks holds every expert whole and sees half of the tokens
    first, second = ranks[2].run(trained_experts, models["mixtral"], tp=2, etp=1)
    assert len(first) == 4 * 4 * 2  # layers, experts, fc1 and fc2
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def test_bf16_follows_the_float32_curve(ranks, models, one_rank_curves):
    expected = np.array(one_rank_curves["mixtral"])[:3, 0]
    for found in ranks[2].run(curve, models["mixtral"], steps=3, ep=2, dtype="bfloat16"):
        assert np.allclose(np.array(found)[:, 0], expected, rtol=0.02)


def test_a_load_balancing_loss_is_added_only_when_asked_for(ranks, models, one_rank_curves):
    settings = {"transformer_args": {"moe_aux_loss_coeff": 10.0}}
    (found,) = ranks[1].run(curve, models["mixtral"], steps=2, **settings)
    # it is no part of the reported loss; its gradient shows
    assert found[0][0] == pytest.approx(one_rank_curves["mixtral"][0][0])
    assert found[0][1] > 1.05 * one_rank_curves["mixtral"][0][1]


@pytest.mark.parametrize("name", ["mixtral", "half dense"])
def test_trained_weights_are_saved_and_loaded_exactly(ranks, models, tmp_path, name):
    ranks[4].run(resave, models[name], tmp_path / "first", steps=1, pp=2, vpp=2, ep=2)
    ranks[2].run(resave, tmp_path / "first", tmp_path / "second", tp=2, etp=1, ep=2)
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("first", "second"))
    source = load_file(models[name] / "model.safetensors")
    assert first.keys() == second.keys() == source.keys()
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)
    assert all(first[t].shape == source[t].shape for t in first)
    num_changed = sum(not torch.equal(first[tensor], source[tensor]) for tensor in first)
    assert num_changed == len(first), "every tensor was trained"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")


@pytest.mark.parametrize(
    ("name", "saved_on", "resumed_on"),
    [
        ("mixtral", "ep2", "tp2 etp1 ep2"),
        ("mixtral", "one rank", "tp2 ep2"),
        ("half dense", "pp2 vpp2 ep2", "ep2"),
        ("half dense", "ep2", "uneven pp2"),
    ],
)
def test_resume_on_other_ranks_continues_the_curve(
    ranks, models, one_rank_curves, tmp_path, name, saved_on, resumed_on
):
    (world_size, sizes), (other_size, others) = LAYOUTS[saved_on], LAYOUTS[resumed_on]
    ranks[world_size].run(train_and_save, models[name], tmp_path, **sizes)
    for found in ranks[other_size].run(resume, models[name], tmp_path, **others):
        expected = one_rank_curves[name][2:]
        assert np.allclose(found, expected, rtol=2e-4), f"{found}\n{expected}"


@pytest.mark.parametrize(
    ("name", "world_size", "settings"),
    [
        ("mixtral", 4, {"ep": 2}),
        ("half dense", 2, {"pp": 2, "use_distributed_optimizer": False}),
        ("half dense", 2, {"pp": 2, "dtype": "bfloat16", "use_distributed_optimizer": False}),
        ("half dense", 4, {"pp": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
)
def test_resume_on_the_same_ranks_continues_exactly(
    ranks, models, tmp_path, name, world_size, settings
):
    expected = ranks[world_size].run(curve, models[name], steps=5, **settings)[0][2:]
    ranks[world_size].run(train_and_save, models[name], tmp_path, **settings)
    for found in ranks[world_size].run(resume, models[name], tmp_path, **settings):
        assert found == expected


def test_several_gradient_buckets_are_resumed_with_another_expert_parallel_size(
    ranks, models, tmp_path
):
    overlap = {"overlap_grad_reduce": True, "bucket_size": 3000}
    expected = ranks[2].run(curve, models["mixtral"], steps=5, ep=2, **overlap)[0][2:]
    ranks[2].run(train_and_save, models["mixtral"], tmp_path, ep=2, **overlap)
    for found in ranks[2].run(resume, models["mixtral"], tmp_path, **overlap):
        assert np.allclose(found, expected, rtol=2e-4), f"{found}\n{expected}"


@pytest.mark.parametrize("settings", [{}, {"use_distributed_optimizer": False}])
def test_losses_are_the_same_with_and_without_offloading(ranks, models, settings):
    plain = ranks[2].run(curve, models["mixtral"], steps=3, ep=2, **settings)
    assert ranks[2].run(offloading_curve, models["mixtral"], ep=2, **settings) == plain


def test_experts_are_offloaded_too(ranks, models):
    sizes = ranks[2].run(freed_bytes, models["mixtral"], ep=2, dtype="bfloat16")[0]
    # per parameter: 2 bytes of weight, 4 of gradient, 12 of main parameter and two moments; two
    # ranks share the optimizer state of what both hold
    assert sizes["weights"] == pytest.approx(2 * sizes["num_parameters"], rel=0.02)
    assert sizes["grads"] == pytest.approx(4 * sizes["num_parameters"], rel=0.02)
    num_states = sizes["num_expert_parameters"] + sizes["num_dense_parameters"] / 2
    assert sizes["optimizer"] == pytest.approx(12 * num_states, rel=0.02)


def test_unequal_rows_are_refused_instead_of_waiting(ranks, models):
    for message in ranks[2].run(error_of_unequal_rows, models["mixtral"], ep=2):
        assert "there are 2 to 4 micro-batches of 2 to 2 rows" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ep": 2}, "expert_model_parallel_size=2 x pipeline_model_parallel_size=1"),
        ({"ep": 3, "etp": 1}, "expert_model_parallel_size=3"),
    ],
)
def test_sizes_that_the_ranks_cannot_form_are_refused(ranks, models, settings, message):
    assert message in ranks[1].run(error_of_building, models["mixtral"], **settings)[0]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"num_experts_per_tok": 1}, {}, "num_experts_per_tok=1 is not supported"),
        ({"shared_expert_intermediate_size": 64}, {}, "shared_expert_intermediate_size=64"),
        ({"router_jitter_noise": 0.1}, {}, "router_jitter_noise=0.1"),
        ({"sliding_window": 4096}, {}, "sliding_window=4096"),
        ({}, {"expert_model_parallel_size": 3}, "must divide the 8 experts"),
        ({}, {"expert_tensor_parallel_size": 3}, "must divide the width of an expert, 14336"),
        ({"model_type": "llama"}, {"expert_model_parallel_size": 2}, "describes a dense one"),
        ({"model_type": "qwen2_moe"}, {}, "supported: llama, qwen2, qwen3, mixtral, qwen3_moe"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(change, settings, message):
    from chatlearn_vllm.engines.megatron.architectures import transformer_config

    config = transformers.MixtralConfig().to_dict() | change
    with pytest.raises(ValueError, match=message):
        transformer_config(config, **settings)


def test_each_layer_has_experts_where_hugging_face_puts_them():
    from chatlearn_vllm.engines.megatron.architectures import transformer_config

    config = transformers.Qwen3MoeConfig(
        num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]
    )
    assert transformer_config(config.to_dict()).moe_layer_freq == [0, 1, 0, 0, 0, 1]


def hugging_face(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = tiny_models.batch()
    targets, mask = rows["all_tokens"][:, 1:], rows["loss_mask"][:, 1:]
    logits = model(rows["all_tokens"]).logits[:, :-1]
    found = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask
    loss = -found.sum() / 100.0
    loss.backward()
    norms = torch.stack([parameter.grad.norm() for parameter in model.parameters()])
    return {
        "logprobs": found.detach(),
        "loss": float(loss.detach()),
        "grad_norm": float(norms.norm()),
    }


def logprobs(path, **settings):
    """(data parallel rank and size, logprobs of this rank's rows where loss_mask is 1)."""
    with tiny_models.engine(path, trainable=False, **settings) as engine:
        scores = engine.forward_only(
            tiny_models.shard(engine),
            lambda batch, logprobs, _: logprobs * batch["loss_mask"][:, 1:],
        )
        padded = [F.pad(s, (0, tiny_models.SEQ_LENGTH - 1 - s.size(1))) for s in scores]
        return engine.data_parallel_rank, engine.data_parallel_size, torch.cat(padded)


def curve(path, steps, **settings):
    with tiny_models.engine(path, **settings) as engine:
        return tiny_models.train(engine, steps)


def trained_experts(path, **settings):
    with tiny_models.engine(path, **settings) as engine:
        tiny_models.train(engine, 2)
        return {n: p.detach().clone() for n, p in engine.parameters.named() if ".experts." in n}


def resave(source, target, steps=0, **settings):
    with tiny_models.engine(source, **settings) as engine:
        tiny_models.train(engine, steps)
        engine.save_hf(target)


def train_and_save(path, directory, **settings):
    with tiny_models.engine(path, **settings) as engine:
        tiny_models.train(engine, 2)
        engine.save_checkpoint(directory, 2)


def resume(path, directory, **settings):
    with tiny_models.engine(path, **settings) as engine:
        assert engine.load_checkpoint(directory) == 2
        return tiny_models.train(engine, 3)


def offloading_curve(path, **settings):
    with tiny_models.engine(path, **settings) as engine:
        return tiny_models.offloading_curve(engine)


def freed_bytes(path, **settings):
    with tiny_models.engine(path, **settings) as engine:
        tiny_models.train(engine, 1)
        nothing = {"weights": False, "optimizer": False, "grads": False}
        freed = {part: engine.offload(**{**nothing, part: True}) for part in nothing}
        engine.onload()
        sizes = {name: p.numel() for name, p in engine.parameters.named()}
        num_expert = sum(size for name, size in sizes.items() if ".experts." in name)
        return {
            **freed,
            "num_parameters": sum(sizes.values()),
            "num_expert_parameters": num_expert,
            "num_dense_parameters": sum(sizes.values()) - num_expert,
        }


def error_of_unequal_rows(path, **settings):
    with tiny_models.engine(path, trainable=False, **settings) as engine:
        micro_batches = tiny_models.shard(engine, 1 if engine.data_parallel_rank else 2)
        if engine.data_parallel_rank:
            micro_batches = [
                {key: value.repeat(2, 1) for key, value in batch.items()} for batch in micro_batches
            ]
        try:
            engine.forward_only(micro_batches, lambda batch, logprobs, _: logprobs)
        except ValueError as error:
            return str(error)


def error_of_building(path, **settings):
    try:
        with tiny_models.engine(path, **settings):
            return ""
    except ValueError as error:
        torch.distributed.destroy_process_group()
        return str(error)


def threads_after_training(path, **settings):
    with tiny_models.engine(path, **settings) as engine:
        tiny_models.train(engine, steps=1)
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("settings", [{"ep": 2}, {"lora_r": 2, "target_modules": ["linear_qkv"]}])
def test_a_shut_down_engine_leaves_no_polling_threads(ranks, models, settings):
    first = ranks[2].run(threads_after_training, models["mixtral"], **settings)
    second = ranks[2].run(threads_after_training, models["mixtral"], **settings)
    # A process group that is left has two at least; PyTorch may start one of its own late.
    assert all(now - before < 2 for before, now in zip(first, second, strict=True))
