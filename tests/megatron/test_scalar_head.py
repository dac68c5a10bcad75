"""A model with a scalar head computes, learns, saves and resumes as *ForSequenceClassification."""

import json
import logging
from logging.handlers import BufferingHandler

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chatlearn_vllm.engines.megatron import engine as engine_module
from chatlearn_vllm.engines.megatron.export import export
from chatlearn_vllm.engines.megatron.micro_batches import put_back, take
from chatlearn_vllm.modules.reward_module import at_last_token
from tests.helpers.tiny_llama import save_character_tokenizer
from tests.megatron import tiny_models

MODELS = {
    "llama": ("llama", {}),
    # head_dim x heads is not hidden_size; biases; the embedding would be tied to an output layer
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}
ADAM_EPS = 1e-4
"""Large: else a gradient that is rounding error only moves its weight as far as any other."""
SEQUENCE_PARALLEL = {"tp": 2, "sequence_parallel": True}
PACKED = {"max_tokens_per_micro_batch": 44, "sequence_packing": True}
RUNS = [
    ("llama", 2, {"tp": 2}),
    ("llama", 2, SEQUENCE_PARALLEL),
    ("llama", 2, {"pp": 2}),
    ("llama", 2, {"pp": 2, "vpp": 2, **PACKED}),
    ("llama", 2, {}),
    ("llama", 2, {"use_distributed_optimizer": False, "max_tokens_per_micro_batch": 44}),
    ("llama", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ("llama", 4, {"pp": 2, "recompute_granularity": "full", **SEQUENCE_PARALLEL, **PACKED}),
    ("qwen2 tied", 2, {"pp": 2}),
    ("qwen2 tied", 4, {"pp": 2, "tp": 2}),
    ("qwen3", 2, {**SEQUENCE_PARALLEL, **PACKED}),
    ("mixtral", 2, {"tp": 2}),
    ("mixtral", 2, {"ep": 2, **PACKED}),
    ("qwen3_moe", 2, {"pp": 2}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for name, (family, overrides) in MODELS.items():
        directory = tmp_path_factory.mktemp("model")
        made[name] = tiny_models.save_model(directory, family, head="scalar", **overrides)
    return made


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A llama that ends with a vocabulary."""
    return tiny_models.save_model(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def one_rank(ranks, models, tmp_path_factory):
    """By model: values before and curve of three steps on one rank, and the weights after them."""
    made = {}
    for name, path in models.items():
        saved = tmp_path_factory.mktemp("one_rank")
        (found,) = ranks[1].run(values_and_steps, path, saved)
        made[name] = {**found, "weights": load_file(saved / "hf" / "model.safetensors")}
    return made


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_hugging_face(models, one_rank, name):
    expected = hugging_face(models[name])
    assert (one_rank[name]["values"] - expected["values"]).abs().max() < 1e-5
    assert one_rank[name]["curve"][0] == pytest.approx(expected["loss_and_norm"], rel=1e-5)


@pytest.mark.parametrize(("name", "world_size", "settings"), RUNS)
def test_nothing_depends_on_the_layout(
    ranks, models, one_rank, tmp_path, name, world_size, settings
):
    expected = one_rank[name]
    for found in ranks[world_size].run(values_and_steps, models[name], tmp_path, **settings):
        rank, size = found["data_parallel"]
        assert (found["values"] - expected["values"][rank::size]).abs().max() < 1e-5
        assert found["curve"][0] == pytest.approx(expected["curve"][0], rel=1e-5)
        assert np.allclose(found["curve"], expected["curve"], rtol=1e-4)
        assert found["error"] == pytest.approx(expected["error"], rel=1e-4)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert weights.keys() == expected["weights"].keys()
    before = load_file(models[name] / "model.safetensors")
    for key, weight in weights.items():
        assert torch.allclose(weight, expected["weights"][key], atol=2e-4), key
        assert not torch.equal(weight, before[key]), key


@pytest.mark.parametrize("settings", [{}, {"pp": 2}])
def test_a_provider_that_ties_the_embedding_does_not_tie_the_head(
    ranks, models, one_rank, tmp_path, settings
):
    args = (values_and_steps_of_a_tied_model, models["qwen2 tied"], tmp_path)
    for found in ranks[settings.get("pp", 1)].run(*args, **settings):
        assert np.allclose(found["curve"], one_rank["qwen2 tied"]["curve"], rtol=1e-4)


def test_bf16_values_are_float32_and_follow(ranks, models, one_rank, tmp_path):
    settings = {"dtype": "bfloat16", **SEQUENCE_PARALLEL}
    for found in ranks[2].run(values_and_steps, models["llama"], tmp_path, **settings):
        assert found["values"].dtype == torch.float32
        # rounded to bfloat16, all of them would have 16 zero bits
        assert (found["values"].view(torch.int32) & 0xFFFF).any()
        losses = [np.array(one["curve"])[:, 0] for one in (found, one_rank["llama"])]
        assert np.allclose(*losses, rtol=0.05)


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_by_two(ranks, models, tmp_path_factory):
    """Checkpoint of two data parallel ranks after one step."""
    directory = tmp_path_factory.mktemp("dp2")
    ranks[2].run(train_and_save, models["llama"], directory, "scalar")
    return directory


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [(1, {}), (2, {"pp": 2, "vpp": 2}), (4, {"pp": 2, **SEQUENCE_PARALLEL})],
)
def test_resume_on_other_ranks_continues_the_curve(
    ranks, models, one_rank, saved_by_two, world_size, settings
):
    expected = one_rank["llama"]["curve"][1:]
    for found in ranks[world_size].run(resume, models["llama"], saved_by_two, **settings):
        assert np.allclose(found, expected, rtol=2e-4), f"{found}\n{expected}"


def test_a_checkpoint_of_the_other_head_is_refused(ranks, models, causal, saved_by_two, tmp_path):
    ranks[1].run(train_and_save, causal, tmp_path, "lm")
    (message,) = ranks[1].run(error_of_resuming, models["llama"], tmp_path, "scalar")
    assert message.startswith(f"{tmp_path}/iter_0000001: holds a model with head 'lm', which")
    assert (
        "one with head 'scalar'; give each model a directory of its own with the key save"
        in message
    )
    (message,) = ranks[1].run(error_of_resuming, causal, saved_by_two, "lm")
    assert "holds a model with head 'scalar'" in message


@pytest.mark.parametrize(
    "settings", [{"tp": 2, "pp": 2}, {"tp": 2, "use_distributed_optimizer": False}]
)
def test_what_is_saved_scores_alike_in_hugging_face(ranks, models, tmp_path, settings):
    rows = tiny_models.batch()
    found = ranks[4].run(train_and_save_hf, models["llama"], tmp_path, **settings)[0]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model) is transformers.LlamaForSequenceClassification
    assert model.config.num_labels == 1
    ends = (rows["loss_mask"] * torch.arange(tiny_models.SEQ_LENGTH)).argmax(1)
    padded = torch.where(
        torch.arange(tiny_models.SEQ_LENGTH) > ends[:, None], 0, rows["all_tokens"]
    )
    with torch.no_grad():
        expected = model.eval()(padded).logits[:, 0]  # at the last token that is not padding
    assert (found[torch.arange(8), ends] - expected).abs().max() < 1e-5


PADDINGS = {
    # pad_token, unk_token and the text of token 0 -> padding of what is saved
    "is EOS": ("</s>", None, "<pad>", 0),
    "is EOS, nothing spare": ("</s>", None, "<zero>", 99),
    "none": (None, None, "<zero>", 99),
    "none, but unk": (None, "<zero>", "<zero>", 0),
}
"""The model's vocabulary has 100 tokens, the tokenizer's 98 and `</turn>`, which ends texts too."""


@pytest.mark.parametrize("padding", PADDINGS)
def test_what_is_saved_scores_rows_at_their_end_of_sequence(ranks, tmp_path, padding):
    *tokens, expected_id = PADDINGS[padding]
    source = tiny_models.save_model(
        tmp_path / "source", head="scalar", vocab_size=100, pad_token_id=2, eos_token_id=2
    )
    save_tokenizer_with_turns(source, *tokens)
    texts = ["1+1=2</s>", "2+20=22</turn>", "3+3=</s>"]
    rows = encode(source, texts)
    (found,) = ranks[1].run(scores_and_saved, source, tmp_path, rows)
    export(tmp_path / "checkpoints", tmp_path / "exported")
    for saved in (tmp_path / "hf", tmp_path / "exported"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(saved).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
        assert (model.config.pad_token_id, tokenizer.pad_token_id) == (expected_id, expected_id)
        with torch.no_grad():
            alone = [model(torch.tensor([row])).logits[0, 0] for row in rows]
            together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
        assert (found - torch.stack(alone)).abs().max() < 1e-5
        assert (found - together).abs().max() < 1e-5


def test_a_saved_model_pads_with_no_token_that_ends_a_text(tmp_path):
    from chatlearn_vllm.engines.megatron.scalar_head import hf_config_with_scalar_head

    config = {"model_type": "qwen2", "eos_token_id": [7, 8], "vocab_size": 10}

    def padding(*directories, **changes):
        return hf_config_with_scalar_head(config | changes, directories)["pad_token_id"]

    saved = hf_config_with_scalar_head(config, [tmp_path])
    assert saved["architectures"] == ["Qwen2ForSequenceClassification"]
    assert saved["pad_token_id"] is None  # no other token is known
    assert padding(pad_token_id=8) is None
    assert padding(pad_token_id=-1) is padding(pad_token_id=10) is None  # have no embedding
    assert padding(pad_token_id=0) == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    added = [{"id": 7, "content": "<end>"}, {"id": 5, "content": "<pad>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert padding(tmp_path / "none", tmp_path) == 5
    assert padding(tmp_path, pad_token_id=0) == 5  # the tokenizer pads the rows
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert padding(tmp_path, pad_token_id=5) is None  # 8 would be next and ends texts
    reserved = {"id": 3, "content": "<|reserved_0|>", "special": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [*added, reserved]}))
    assert padding(tmp_path) == 3


# ---- first weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "settings"), [(1, {}), (4, {"tp": 2, "pp": 2})])
def test_a_causal_model_gets_a_head_of_zeros_and_learns(ranks, causal, world_size, settings):
    results = ranks[world_size].run(head_of_causal_model, causal, **settings)
    assert [result["messages"] for result in results] == [
        [f"{causal} has no score.weight: the scalar head starts from zeros"],
        *[[]] * (world_size - 1),
    ]
    assert not results[0]["before"].any()
    targets = tiny_models.batch_with_returns()
    loss = (targets["returns"] * targets["loss_mask"][:, 1:]).square().sum() / 100
    first, second = results[0]["curve"]
    assert first[0] == pytest.approx(float(loss), rel=1e-5)  # all values are 0
    assert second[0] < first[0]


def test_a_model_from_nothing_is_the_same_on_any_ranks(ranks, causal, tmp_path):
    config = json.loads((causal / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (expected,) = ranks[1].run(head_of_causal_model, tmp_path)
    assert not expected["before"].any()
    assert len(expected["messages"]) == 2
    for settings in ({"tp": 2}, {"pp": 2}):
        found = ranks[2].run(head_of_causal_model, tmp_path, **settings)[0]
        assert np.allclose(found["curve"], expected["curve"], rtol=1e-4)


def test_heads_that_are_not_one_number_are_refused(ranks, models, tmp_path):
    config = (models["llama"] / "config.json").read_text()
    tensors = load_file(models["llama"] / "model.safetensors")
    for name, extra in (
        ("two", {"score.weight": torch.zeros(2, 32)}),
        ("bias", {"score.bias": torch.zeros(1)}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        save_file({**tensors, **extra}, tmp_path / name / "model.safetensors")
    (message,) = ranks[1].run(error_of_building, tmp_path / "two")
    assert "score.weight: is (2, 32), a head with one label is (1, 32)" in message
    (message,) = ranks[1].run(error_of_building, tmp_path / "bias")
    assert message.startswith(f"{tmp_path / 'bias'}: score.bias is not supported")
    (message,) = ranks[1].run(error_of_building, models["llama"], lora_r=2)
    assert message.startswith("lora_r=2 is not supported for a model with a scalar head")


# ---- on the ranks -------------------------------------------------------------------------------


def values_and_steps(path, directory, **settings):
    """Values of this rank's rows, 0 behind them; then three training steps; writes `hf`."""
    with tiny_models.engine(path, head="scalar", adam_eps=ADAM_EPS, **settings) as engine:
        rows = tiny_models.rows_of_rank(engine, tiny_models.batch())
        values = all_values(engine, rows)
        curve = tiny_models.train(engine, steps=2)
        metrics, sums = engine.train_step(tiny_models.shard(engine), tiny_models.squared_errors)
        engine.save_hf(directory / "hf")
        return {
            "values": values,
            "curve": [*curve, [metrics["loss"], metrics["grad_norm"]]],
            "error": sums["error"],
            "data_parallel": (engine.data_parallel_rank, engine.data_parallel_size),
        }


def values_and_steps_of_a_tied_model(path, directory, **settings):
    original = engine_module.build_gpt_model

    def build(*args, **kwargs):
        return original(*args, **{**kwargs, "share_embeddings_and_output_weights": True})

    engine_module.build_gpt_model = build
    try:
        return values_and_steps(path, directory, **settings)
    finally:
        engine_module.build_gpt_model = original


def all_values(engine, rows):
    """[B, S] of every token up to the last that counts."""
    groups = engine.batching.group_rows(rows, 2, is_optimizer_step=False)

    def up_to_the_last(batch, values):
        assert values.shape == batch["all_tokens"].shape
        return values * (batch["loss_mask"].flip(1).cummax(1).values.flip(1) != 0)

    parts = engine.forward_only([take(rows, group) for group in groups], up_to_the_last)
    return put_back(parts, groups, tiny_models.SEQ_LENGTH)


def train_and_save(path, directory, head):
    with tiny_models.engine(path, head=head, adam_eps=ADAM_EPS) as engine:
        tiny_models.train(engine, steps=1)
        engine.save_checkpoint(directory, 1)


def resume(path, directory, **settings):
    with tiny_models.engine(path, head="scalar", adam_eps=ADAM_EPS, **settings) as engine:
        assert engine.load_checkpoint(directory) == 1
        return tiny_models.train(engine, steps=2)


def error_of_resuming(path, directory, head):
    with tiny_models.engine(path, head=head) as engine:
        try:
            engine.load_checkpoint(directory)
        except ValueError as error:
            return str(error)


def train_and_save_hf(path, directory, **settings):
    """Values [8, S] after a step."""
    with tiny_models.engine(path, head="scalar", **settings) as engine:
        tiny_models.train(engine, steps=1)
        engine.save_hf(directory)
        return all_values(engine, tiny_models.batch())


def scores_and_saved(path, directory, rows):
    """Scores of rows of token ids at their ends; writes `hf`, and a checkpoint."""
    with tiny_models.engine(path, head="scalar") as engine:
        engine.save_hf(directory / "hf")
        engine.save_checkpoint(directory / "checkpoints", 1)
        tokens = torch.full((len(rows), tiny_models.SEQ_LENGTH), 2)
        mask = torch.zeros(tokens.shape)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)
            mask[number, 1 : len(row)] = 1.0
        batch = {"all_tokens": tokens, "loss_mask": mask}
        return at_last_token(all_values(engine, batch), mask)


def head_of_causal_model(path, **settings):
    """What is logged, the head that the last stage starts with, and a curve."""
    handler = BufferingHandler(capacity=100)
    engine_logger = logging.getLogger("chatlearn_vllm.engines.megatron.init_weights")
    engine_logger.addHandler(handler)
    try:
        with tiny_models.engine(path, head="scalar", **settings) as engine:
            assert engine.is_head_new
            weights = dict(engine.parameters.named())
            before = weights.get("output_layer.weight", torch.zeros(1)).detach().clone()
            curve = tiny_models.train(engine, steps=2)
    finally:
        engine_logger.removeHandler(handler)
    messages = [record.getMessage() for record in handler.buffer]
    return {"messages": messages, "before": before, "curve": curve}


def error_of_building(path, **settings):
    try:
        with tiny_models.engine(path, head="scalar", **settings):
            return ""
    except ValueError as error:
        return str(error)


# ---- tokenizers ---------------------------------------------------------------------------------


def save_tokenizer_with_turns(directory, pad_token, unk_token, token_0):
    """Of characters; `</turn>` is a special token, named by generation_config.json as an end."""
    save_character_tokenizer(directory)
    for path in (directory / "tokenizer.json", directory / "tokenizer_config.json"):
        path.write_text(path.read_text().replace('"<pad>"', json.dumps(token_0)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</turn>"]})
    tokenizer.pad_token, tokenizer.unk_token = pad_token, unk_token
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 98]}))


def encode(directory, texts):
    return transformers.AutoTokenizer.from_pretrained(directory)(texts)["input_ids"]


# ---- Hugging Face -------------------------------------------------------------------------------


def hugging_face(path):
    """Values [8, S] up to each row's last token that counts; loss and norm of its gradient."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32
    )
    rows = tiny_models.batch_with_returns()
    hidden = model.model(rows["all_tokens"]).last_hidden_state
    values = model.score(hidden)[..., 0]
    loss, _ = tiny_models.squared_errors(rows, values)
    loss.backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    mask = rows["loss_mask"].flip(1).cummax(1).values.flip(1)
    return {
        "values": values.detach() * mask,
        "loss_and_norm": [float(loss), float(torch.stack(squares).sum().sqrt())],
    }
