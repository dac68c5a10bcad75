"""What is saved in Hugging Face form loads in transformers, with equal weights."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chatlearn_vllm.engines.megatron import hf_checkpoint
from tests.megatron import tiny_models


def state_dict(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model.state_dict()


@pytest.mark.parametrize(
    ("family", "tied", "world_size", "settings"),
    [
        ("llama", False, 1, {}),
        ("qwen2", True, 2, {"pp": 2, "vpp": 2}),
        ("qwen3", True, 4, {"tp": 2, "pp": 2}),
        ("llama", False, 4, {"tp": 4}),
    ],
)
def test_loading_and_saving_changes_no_bit(ranks, tmp_path, family, tied, world_size, settings):
    source = tiny_models.save_model(tmp_path / "source", family, tie_word_embeddings=tied)
    (source / "tokenizer.json").write_text("{}")
    ranks[world_size].run(resave, source, tmp_path / "saved", **settings)
    saved, expected = state_dict(tmp_path / "saved"), state_dict(source)
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(saved[name], weight), name
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"
    assert not list(tmp_path.glob(".*")), "no temporary directory is left"


def test_trained_weights_in_several_files_load_in_transformers(ranks, tmp_path):
    source = tiny_models.save_model(tmp_path / "source")
    settings = {"tp": 2, "dtype": "bfloat16", "overlap_grad_reduce": True,
                "overlap_param_gather": True}  # fmt: skip
    weights = ranks[4].run(resave, source, tmp_path / "saved", steps=2, max_file_bytes=9000,
                           **settings)  # fmt: skip
    saved = tmp_path / "saved"
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 3
    config = json.loads((saved / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    found = state_dict(saved)
    norm = found["model.norm.weight"]
    assert norm.dtype == torch.bfloat16
    assert torch.equal(norm, weights[3]["decoder.final_layernorm.weight"])
    # and it loads here again, from several files
    again = ranks[1].run(resave, saved, tmp_path / "again", dtype="bfloat16")[0]
    fc2 = [weights[rank]["decoder.layers.1.mlp.linear_fc2.weight"] for rank in (0, 1)]
    assert torch.equal(again["decoder.layers.1.mlp.linear_fc2.weight"], torch.cat(fc2, 1))


def test_every_missing_or_misshapen_tensor_is_named(ranks, tmp_path):
    source = tiny_models.save_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (message,) = ranks[1].run(error_of_building, source)
    assert "model.layers.1.mlp.up_proj.weight: not in the checkpoint" in message
    assert "model.norm.weight: is (7,), config.json says (32,)" in message


def test_weights_that_are_not_safetensors_are_refused(ranks, tmp_path):
    source = tiny_models.save_model(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    (message,) = ranks[1].run(error_of_building, source)
    assert "pytorch_model.bin is not read" in message


def test_a_failed_save_keeps_the_older_directory(ranks, tmp_path):
    source = tiny_models.save_model(tmp_path / "source")
    saved = tiny_models.save_model(tmp_path / "saved")
    assert ranks[1].run(save_that_fails, source, saved) == ["disk full"]
    assert state_dict(saved).keys() == state_dict(source).keys()


def resave(source, target, steps=0, max_file_bytes=hf_checkpoint.MAX_FILE_BYTES, **settings):
    """Load, perhaps train, save; returns this rank's parameters."""
    with tiny_models.engine(source, **settings) as engine:
        tiny_models.train(engine, steps)
        engine.save_hf(target, max_file_bytes=max_file_bytes)
        return {name: p.detach().clone() for name, p in engine.parameters.named()}


def error_of_building(source):
    try:
        with tiny_models.engine(source):
            return ""
    except ValueError as error:
        return str(error)


def save_that_fails(source, target):
    with tiny_models.engine(source) as engine:

        def fail(*args):
            raise OSError("disk full")

        original, hf_checkpoint._write_config = hf_checkpoint._write_config, fail
        try:
            engine.save_hf(target)
        except OSError as error:
            return str(error)
        finally:
            hf_checkpoint._write_config = original
