"""Adapters train as in plain torch however the ranks are arranged, and merge into the weights."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from chatlearn_vllm.engines.megatron.optimizer import DistributedOptimizer
from chatlearn_vllm.weight_sync.lora import merge_into
from tests.megatron import tiny_models

ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-3}
"""None of them the default, nor torch's."""
LORA = {"lora_r": 4, "lora_alpha": 8.0, **ADAM}
SCALE = 2.0
STEPS = 4
SEQUENCE_PARALLEL = {"tp": 2, "sequence_parallel": True}
RECOMPUTE = {"recompute_granularity": "full"}
LAYOUTS = {
    "recompute": (1, RECOMPUTE),
    "tp2": (2, {"tp": 2}),
    "tp2, sequence parallel": (2, SEQUENCE_PARALLEL),
    "tp4, more than kv heads": (4, {"tp": 4}),
    "pp2": (2, {"pp": 2}),
    "pp2, vpp2, recompute": (2, {"pp": 2, "vpp": 2, **RECOMPUTE}),
    "dp2": (2, {}),
    "dp2, plain optimizer": (2, {"use_distributed_optimizer": False}),
    "dp2, overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2 pp2, sequence parallel, recompute": (4, {"pp": 2, **SEQUENCE_PARALLEL, **RECOMPUTE}),
    "tp2 dp2, sequence parallel, plain optimizer": (
        4,
        {**SEQUENCE_PARALLEL, "use_distributed_optimizer": False},
    ),
}

CORE = (
    "tp4, more than kv heads",
    "dp2",
    "pp2, vpp2, recompute",
    "tp2 dp2, sequence parallel, plain optimizer",
)
"""Together they use every kind of parallelism; the others run with the slow tests."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def one_rank(ranks, llama, tmp_path_factory):
    """(curve, merged weights) of one rank."""
    directory = tmp_path_factory.mktemp("one")
    (curve,) = ranks[1].run(train_and_save, llama, directory)
    return curve, load_file(directory / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def saved_by_two(ranks, llama, tmp_path_factory):
    """Checkpoint of two data parallel ranks after two steps."""
    directory = tmp_path_factory.mktemp("dp2")
    ranks[2].run(train_and_checkpoint, llama, directory, steps=2)
    return directory


def test_curve_and_weights_are_those_of_plain_torch(ranks, llama, one_rank):
    curve, weights = one_rank
    (adapters,) = ranks[1].run(initial_adapters, llama)
    expected_curve, expected_weights = train_in_plain_torch(llama, adapters)
    assert np.allclose(curve, expected_curve, rtol=1e-4), f"{curve}\n{expected_curve}"
    base = load_file(llama / "model.safetensors")
    for name, expected in expected_weights.items():
        assert torch.allclose(weights[name], expected, atol=2e-4), name
        is_adapted = name.endswith("_proj.weight")
        assert is_adapted != torch.equal(weights[name], base[name]), name


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=[] if layout in CORE else pytest.mark.slow) for layout in LAYOUTS],
)
def test_curve_and_weights_do_not_depend_on_the_layout(ranks, llama, one_rank, tmp_path, layout):
    world_size, settings = LAYOUTS[layout]
    expected_curve, expected_weights = one_rank
    for curve in ranks[world_size].run(train_and_save, llama, tmp_path, **settings):
        assert np.allclose(curve, expected_curve, rtol=1e-4), f"{curve}\n{expected_curve}"
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        assert torch.allclose(weights[name], expected, atol=2e-4), name


def test_biases_and_tied_embeddings_on_two_stages_stay_frozen(ranks, tmp_path):
    path = tiny_models.save_model(tmp_path / "qwen", "qwen2", tie_word_embeddings=True)
    (expected,) = ranks[1].run(train_and_save, path, tmp_path)
    settings = {"tp": 2, "pp": 2, "sequence_parallel": True}
    for curve in ranks[4].run(train_and_save, path, tmp_path, **settings):
        assert np.allclose(curve, expected, rtol=1e-4)


def test_some_layers_only(ranks, llama, tmp_path):
    settings = {"target_modules": ("linear_fc1",), **RECOMPUTE}
    (expected,) = ranks[1].run(train_and_save, llama, tmp_path, **settings)
    for curve in ranks[2].run(train_and_save, llama, tmp_path, tp=2, **settings):
        assert np.allclose(curve, expected, rtol=1e-4)
    base = load_file(llama / "model.safetensors")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], found[name])}
    assert changed == {"gate_proj", "up_proj"}


def test_attention_of_a_model_with_experts(ranks, tmp_path):
    path = tiny_models.save_model(tmp_path / "mixtral", "mixtral")
    settings = {"target_modules": ("linear_qkv", "linear_proj")}
    (expected,) = ranks[1].run(train_and_save, path, tmp_path, **settings)
    assert expected[-1][0] < expected[0][0]
    for curve in ranks[4].run(train_and_save, path, tmp_path, tp=2, ep=2, **settings):
        assert np.allclose(curve, expected, rtol=1e-4), f"{curve}\n{expected}"
    (message,) = ranks[1].run(error_of, train_and_save, path, tmp_path)
    assert "is an expert's layer, which cannot have an adapter" in message


def test_bf16_follows_the_float32_curve(ranks, llama, one_rank, tmp_path):
    settings = {**SEQUENCE_PARALLEL, "dtype": "bfloat16"}
    for curve in ranks[4].run(train_and_save, llama, tmp_path, **settings):
        losses = np.array(curve)[:, 0]
        assert np.allclose(losses, np.array(one_rank[0])[:, 0], rtol=0.02)


def test_parameters_are_those_of_a_model_without_adapters(ranks, llama):
    with_adapters = ranks[2].run(parameter_shapes, llama, tp=2, **LORA)
    assert with_adapters == ranks[2].run(parameter_shapes, llama, tp=2)


def test_merged_weights_score_as_weights_and_adapters_do(ranks, llama, tmp_path):
    scores = ranks[2].run(scores_with_and_without, llama, tmp_path, tp=2)[0]
    (merged,) = ranks[1].run(scores_of, tmp_path / "hf")
    assert torch.allclose(merged, scores["trained"], atol=2e-5)
    assert not torch.allclose(scores["base"], scores["trained"], atol=1e-2)
    assert torch.equal(scores["disabled"], scores["base"])
    assert torch.equal(scores["enabled again"], scores["trained"])


@pytest.mark.parametrize(
    ("world_size", "settings"), [(1, {}), (4, {"tp": 2, "pp": 2}), (4, {"tp": 4})]
)
def test_saved_adapters_on_the_base_are_the_merged_weights(
    ranks, llama, tmp_path, world_size, settings
):
    ranks[world_size].run(train_and_save, llama, tmp_path, **settings)
    base = load_file(llama / "model.safetensors")
    merged = load_file(tmp_path / "hf" / "model.safetensors")
    adapter = load_file(tmp_path / "hf" / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "hf" / "adapter" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    names = [name for name in base if name.split(".")[-2] in config["target_modules"]]
    assert len(names) == 4 * 7 and len(adapter) == 2 * len(names)
    for name in names:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        A, B = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
        assert torch.allclose(base[name] + scale * B @ A, merged[name], atol=1e-6), name


def test_only_adapters_have_gradients_and_optimizer_state(ranks, llama):
    for sizes in ranks[2].run(state_sizes, llama):
        assert sizes["grads"] == pytest.approx(4 * sizes["adapters"], rel=0.05)
        # both moments, shared by two ranks; the main parameters are views of the adapters
        assert sizes["optimizer"] == pytest.approx(4 * sizes["adapters"], rel=0.05)
        assert sizes["weights"] == pytest.approx(4 * (sizes["base"] + sizes["adapters"]), rel=0.01)


@pytest.mark.parametrize("settings", [{}, {"tp": 2, "dtype": "bfloat16"}])
def test_losses_are_the_same_with_and_without_offloading(ranks, llama, settings):
    plain = ranks[2].run(curve_of, llama, **settings)
    assert ranks[2].run(offloading_curve, llama, **settings) == plain


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [(1, {}), (2, {}), (4, {"tp": 2, "pp": 2, "sequence_parallel": True})],
)
def test_resume_continues_the_curve(ranks, llama, one_rank, saved_by_two, world_size, settings):
    for curve in ranks[world_size].run(resume, llama, saved_by_two, **settings):
        assert np.allclose(curve, one_rank[0][2:], rtol=2e-4), f"{curve}\n{one_rank[0][2:]}"


def test_resume_on_the_same_ranks_is_exact(ranks, llama, tmp_path):
    settings = {"tp": 2, "use_distributed_optimizer": False}
    expected = ranks[2].run(train_and_checkpoint, llama, tmp_path, steps=STEPS, **settings)
    ranks[2].run(train_and_checkpoint, llama, tmp_path, steps=2, **settings)
    for curve in ranks[2].run(resume, llama, tmp_path, iteration=2, **settings):
        assert curve == expected[0][2:]


def test_a_checkpoint_of_other_adapters_is_refused(ranks, llama, saved_by_two):
    for settings in ({"lora_alpha": 4.0}, {"lora_r": 0}):
        (message,) = ranks[1].run(error_of, resume, llama, saved_by_two, **settings)
        assert "was saved with {'lora_r': 4, 'lora_alpha': 8.0," in message


def test_a_layer_that_is_not_megatrons_is_refused(ranks, llama):
    (message,) = ranks[1].run(error_of, build_with_foreign_layer, llama)
    assert "decoder.layers.0.mlp.linear_fc2 is a ForeignLinear" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_by_rectangles_is_merging_the_whole(dtype):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(70, 50, generator=generator).to(dtype)
    A = torch.randn(4, 50, generator=generator).to(dtype)
    B = torch.randn(70, 4, generator=generator).to(dtype)
    exact = weight.double() + SCALE * B.double() @ A.double()
    rounding = torch.finfo(dtype).eps * 8
    whole = weight.clone()
    merge_into(whole, B, A, SCALE)
    assert torch.allclose(whole.double(), exact, rtol=rounding, atol=1e-5)
    pieces = torch.zeros(90, 60, dtype=dtype)[5:75, 3:53]  # the live parameter: a strided view
    for rows in (slice(0, 13), slice(13, 64), slice(64, 70)):
        for cols in (slice(0, 1), slice(1, 33), slice(33, 50)):
            piece = pieces[rows, cols]
            piece.copy_(weight[rows, cols])
            merge_into(piece, B[rows], A[:, cols], SCALE, max_bytes=4 * 32 * 7)
    assert torch.allclose(pieces.double(), exact, rtol=rounding, atol=1e-5)
    # at most a last bit between two orders of summation
    assert (pieces.float() - whole.float()).abs().max() <= rounding * exact.abs().max()


def train_and_save(path, directory, **settings):
    """[[loss, grad_norm], ...]; the merged weights go to <directory>/hf."""
    with tiny_models.engine(path, **{**LORA, **settings}) as engine:
        curve = tiny_models.train(engine, STEPS)
        engine.save_hf(directory / "hf")
        return curve


def train_and_checkpoint(path, directory, steps, **settings):
    with tiny_models.engine(path, **LORA, **settings) as engine:
        curve = tiny_models.train(engine, steps)
        engine.save_checkpoint(directory, steps)
        return curve


def resume(path, directory, iteration=None, **settings):
    with tiny_models.engine(path, **{**LORA, **settings}) as engine:
        assert engine.load_checkpoint(directory, iteration) == 2
        return tiny_models.train(engine, STEPS - 2)


def initial_adapters(path):
    """name -> (A, B, [(Hugging Face tensor, its rows, the weight's rows)]) of a fresh engine."""
    with tiny_models.engine(path, **LORA) as engine:
        layouts = {layout.name: layout for layout, _ in engine.parameters.laid_out()}
        return {
            name: (
                A.clone(),
                B.clone(),
                [(b.tensor, b.logical[0], b.local[0]) for b in layouts[name].blocks],
            )
            for name, (A, B) in engine.parameters.adapters().items()
        }


def train_in_plain_torch(path, adapters):
    """(curve, merged weights): Hugging Face's model, autograd and torch's AdamW."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    frozen = {name: p.detach() for name, p in model.named_parameters()}
    trained = {
        name: (A.requires_grad_(), B.requires_grad_()) for name, (A, B, _) in adapters.items()
    }
    parameters = [tensor for pair in trained.values() for tensor in pair]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1
    )

    def merged():
        weights = dict(frozen)
        for name, (A, B) in trained.items():
            rows_of = {}
            for tensor, (first, _), (start, stop) in adapters[name][2]:
                rows_of.setdefault(tensor, []).append((first, B[start:stop]))
            for tensor, pieces in rows_of.items():
                whole = torch.cat([rows for _, rows in sorted(pieces, key=lambda p: p[0])])
                weights[tensor] = frozen[tensor] + SCALE * whole @ A
        return weights

    batch, curve = tiny_models.batch(), []
    tokens, mask = batch["all_tokens"], batch["loss_mask"][:, 1:]
    for _ in range(STEPS):
        logits = torch.func.functional_call(model, merged(), (tokens,)).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        loss = -(logprobs * mask).sum() / 100.0
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        curve.append([loss.item(), norm.item()])
    return curve, {name: weight.detach() for name, weight in merged().items()}


def parameter_shapes(path, **settings):
    with tiny_models.engine(path, **settings) as engine:
        return {name: tuple(p.shape) for name, p in engine.parameters.named()}


def scores_with_and_without(path, directory, **settings):
    def score(engine):
        (scores,) = engine.forward_only([tiny_models.batch()], lambda b, logprobs, e: logprobs)
        return scores

    scores = {}
    with tiny_models.engine(path, **LORA, **settings) as engine:
        scores["base"] = score(engine)
        tiny_models.train(engine, STEPS)
        scores["trained"] = score(engine)
        with engine.adapters_disabled():
            scores["disabled"] = score(engine)
        engine.save_hf(directory / "hf")
        scores["enabled again"] = score(engine)
        return scores


def scores_of(path):
    with tiny_models.engine(path, trainable=False) as engine:
        (scores,) = engine.forward_only([tiny_models.batch()], lambda b, logprobs, e: logprobs)
        return scores


def state_sizes(path):
    """Bytes that each part frees, and numbers of elements."""
    with tiny_models.engine(path, **LORA) as engine:
        tiny_models.train(engine, 1)
        (part,) = engine.optimizer.chained_optimizers
        assert isinstance(part, DistributedOptimizer)
        nothing = {"weights": False, "optimizer": False, "grads": False}
        sizes = {name: engine.offload(**{**nothing, name: True}) for name in nothing}
        engine.onload()
        sizes["base"] = sum(p.numel() for _, p in engine.parameters.named())
        sizes["adapters"] = sum(
            A.numel() + B.numel() for A, B in engine.parameters.adapters().values()
        )
        return sizes


def curve_of(path, **settings):
    with tiny_models.engine(path, **LORA, **settings) as engine:
        return tiny_models.train(engine, 3)


def offloading_curve(path, **settings):
    with tiny_models.engine(path, **LORA, **settings) as engine:
        return tiny_models.offloading_curve(engine)


class ForeignLinear(torch.nn.Linear):
    """A layer of a user's own model."""


def build_with_foreign_layer(path):
    from chatlearn_vllm.config import ModelArgs
    from chatlearn_vllm.engines.megatron.engine import MegatronEngine

    def provider(**stage):
        model = engine.default_model_provider(**stage)
        model.decoder.layers[0].mlp.linear_fc2 = ForeignLinear(56, 32, bias=False)
        return model

    args = ModelArgs(load=str(path), dtype="float32", **LORA)
    engine = MegatronEngine(args, trainable=True, model_provider=provider)
    try:
        engine.build()
    finally:
        engine.shutdown()


def error_of(function, *args, **settings):
    try:
        function(*args, **settings)
    except ValueError as error:
        return str(error)
