"""A checkpoint of any parallel sizes becomes what the live engine would have saved."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from chatlearn_vllm.cli.main import main
from chatlearn_vllm.engines.megatron import checkpoint_files
from chatlearn_vllm.engines.megatron.export import export
from tests.helpers.tiny_llama import save_tiny_llama
from tests.megatron import tiny_models

TP2_PP2 = {"tp": 2, "pp": 2}
CASES = {
    "qwen2, tied, virtual stages": (2, "qwen2", {"pp": 2, "vpp": 2}),
    "qwen3_moe with a dense layer": (4, "qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}),
    "mixtral": (4, "mixtral", {"pp": 2, "ep": 2, "dtype": "bfloat16"}),
}
MODELS = {"qwen2": {"tie_word_embeddings": True}, "qwen3_moe": {"mlp_only_layers": [1]}}

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    engine = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4,
        kv_cache_memory_bytes=2**26, distributed_executor_backend="uni",
    )
    outputs = engine.generate(["1+2=", "abc"], SamplingParams(temperature=0, max_tokens=8))
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """Directory with `checkpoints` of two iterations of TP 2 x PP 2, and `hf`, saved with them."""
    root = tmp_path_factory.mktemp("trained")
    save_tiny_llama(root / "source")
    ranks[4].run(train_and_save, root / "source", root, steps=2, **TP2_PP2)
    return root


@pytest.fixture(scope="module")
def exported(trained):
    """What the command line makes of the newest of them, with nothing but that checkpoint there."""
    (trained / "source").rename(trained / "moved")
    assert main(["export", str(trained / "checkpoints"), str(trained / "exported")]) == 0
    return trained / "exported"


def test_an_export_is_what_the_live_engine_saved_bit_by_bit(trained, exported):
    assert_same_files(exported, trained / "hf")
    assert not list(trained.glob(".*")), "no temporary directory is left"


def test_transformers_computes_the_same_with_an_export(trained, exported):
    tokens = tiny_models.batch()["all_tokens"]
    with torch.no_grad():
        live, found = (
            transformers.AutoModelForCausalLM.from_pretrained(path)(tokens).logits
            for path in (trained / "hf", exported)
        )
    assert torch.equal(live, found)
    untrained = transformers.AutoModelForCausalLM.from_pretrained(trained / "moved")
    assert not torch.equal(untrained(tokens).logits, found)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer.encode("1+2=")) == "1+2="


def test_vllm_generates_from_an_export(exported, tmp_path):
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    done = subprocess.run(
        [sys.executable, script, exported],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    expected = []
    for prompt in ("1+2=", "abc"):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        answer = model.generate(tokens, do_sample=False, max_new_tokens=8)
        expected.append(answer[0, tokens.size(1) :].tolist())
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_an_iteration_can_be_chosen_and_its_type_too(trained, tmp_path):
    chosen = trained / "checkpoints" / "iter_0000001"
    assert main(["export", str(chosen), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    first = load_file(tmp_path / "out" / "model.safetensors")
    export(chosen, tmp_path / "wide")
    for name, weight in load_file(tmp_path / "wide" / "model.safetensors").items():
        assert torch.equal(first[name], weight.bfloat16()), name


@pytest.mark.parametrize("case", CASES)
def test_kinds_of_models_and_layouts(ranks, tmp_path, case):
    world_size, family, settings = CASES[case]
    source = tiny_models.save_model(tmp_path / "source", family, **MODELS.get(family, {}))
    ranks[world_size].run(train_and_save, source, tmp_path, steps=1, **settings)
    path = export(tmp_path / "checkpoints", tmp_path / "exported", max_file_bytes=9000)
    assert path == tmp_path / "checkpoints" / "iter_0000001"
    assert_same_files(tmp_path / "exported", tmp_path / "hf")


def test_a_scalar_head_becomes_a_model_for_sequence_classification(ranks, tmp_path):
    source = tiny_models.save_model(tmp_path / "source", head="scalar")
    ranks[2].run(train_and_save, source, tmp_path, steps=1, head="scalar", tp=2)
    export(tmp_path / "checkpoints", tmp_path / "exported")
    assert_same_files(tmp_path / "exported", tmp_path / "hf")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert not info["missing_keys"] and model.score.weight.shape == (1, 32)


def test_adapters_are_merged_or_written_by_themselves(ranks, tmp_path, capsys):
    source = tiny_models.save_model(tmp_path / "source")
    settings = {**TP2_PP2, "lora_r": 4, "lora_alpha": 8.0}
    ranks[4].run(train_and_save, source, tmp_path, steps=2, **settings)
    checkpoints = str(tmp_path / "checkpoints")
    assert main(["export", checkpoints, str(tmp_path / "merged")]) == 0
    assert main(["export", checkpoints, str(tmp_path / "adapter"), "--adapter"]) == 0
    live, base = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "source"))
    for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
        # A matrix product of the whole may sum in another order than one of a rank's part.
        torch.testing.assert_close(weight, live[name], rtol=1e-6, atol=1e-7)
        is_adapted = ".self_attn." in name or ".mlp." in name
        assert torch.equal(weight, base[name]) != is_adapted, name
    assert_same_files(tmp_path / "adapter", tmp_path / "hf" / "adapter")


def test_what_cannot_be_exported_says_why_and_leaves_nothing(trained, tmp_path, capsys):
    checkpoints = trained / "checkpoints"
    for arguments, message in (
        ([trained, tmp_path / "a"], f"no complete checkpoint .* are some in {checkpoints}"),
        ([checkpoints, tmp_path / "b", "--adapter"], "lora_r is 0.*export it without --adapter"),
        ([checkpoints, checkpoints], "is there and not empty; remove it or name another"),
    ):
        assert main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_that_of_config_json_is_refused(trained, tmp_path):
    other = tmp_path / "iter_0000002"
    shutil.copytree(trained / "checkpoints" / "iter_0000002", other)
    config = json.loads((other / "hf" / "config.json").read_text())
    (other / "hf" / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    about = json.loads((other / checkpoint_files.MARKER).read_text())
    del about["files"]["hf/config.json"]
    (other / checkpoint_files.MARKER).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="not of the model that its config.json describes"):
        export(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def train_and_save(source, root, steps, **settings):
    """A checkpoint of each step, and the last weights in Hugging Face form."""
    with tiny_models.engine(source, **settings) as engine:
        for step in range(1, steps + 1):
            tiny_models.train(engine, 1)
            engine.save_checkpoint(root / "checkpoints", step)
        engine.save_hf(root / "hf")


def assert_same_files(found, expected):
    """The same tensors, bit by bit, and the same other files."""
    assert tensors_of(found).keys() == tensors_of(expected).keys()
    for name, tensor in tensors_of(expected).items():
        other = tensors_of(found)[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
    others = [
        {
            path.name: path.read_text()
            for path in directory.iterdir()
            if path.is_file() and "safetensors" not in path.name
        }
        for directory in (found, expected)
    ]
    assert others[0] == others[1] and others[0]


def tensors_of(directory):
    return {
        name: tensor
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
