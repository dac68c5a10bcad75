"""Is the demo's model directory one that `transformers` reads as intended?"""

import sys

import pytest
import sentencepiece
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from examples.megatron import make_tiny_llama

TEXTS = ["27+48=", "75", "", "  ", " 1 + 2\n= 3", "\n\nHuman: wie schön?\n\nAssistant: "]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Run the script's command line; return the directory it wrote."""

    def run(*arguments: str):
        out = tmp_path_factory.mktemp("llama")
        patch = pytest.MonkeyPatch()
        with patch.context() as context:
            context.setattr(sys, "argv", ["make_tiny_llama.py", "--out", str(out), *arguments])
            make_tiny_llama.main()
        return out

    return run


@pytest.fixture(scope="module")
def demo(make):
    return make("--init-weights")


def test_any_text_survives_encoding_and_decoding(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_a_bos_is_put_before_a_text_and_no_eos_behind_it(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = tokenizer.encode("1+1=")
    assert ids[0] == 1 and 2 not in ids
    assert tokenizer.encode("1+1=", add_special_tokens=False) == ids[1:]


def test_each_character_of_arithmetic_is_one_token(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    for character in make_tiny_llama.CHARACTERS:
        (index,) = tokenizer.encode(character, add_special_tokens=False)
        assert 3 + 256 <= index < 288
    assert len(tokenizer) == 288


def test_the_sentencepiece_model_gives_the_same_tokens(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model"))
    for text in TEXTS:
        assert pieces.encode(text) == tokenizer.encode(text, add_special_tokens=False)


def test_generation_stops_at_the_eos(demo):
    generation = GenerationConfig.from_pretrained(demo)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


def test_the_demo_preset_has_one_to_five_million_parameters(demo, capsys):
    model = LlamaForCausalLM.from_pretrained(demo)
    num_parameters = model.num_parameters()
    assert 1e6 <= num_parameters <= 5e6
    assert model.config.vocab_size == 288


def test_the_printed_number_of_parameters_is_the_models(make, capsys):
    out = make("--init-weights", "--hidden-size", "64", "--num-layers", "1")
    num_parameters = LlamaForCausalLM.from_pretrained(out).num_parameters()
    assert f"{num_parameters / 1e6:.2f} M parameters" in capsys.readouterr().out


def test_weights_depend_on_the_seed_alone(make, demo):
    weights = (demo / "model.safetensors").read_bytes()
    assert (make("--init-weights") / "model.safetensors").read_bytes() == weights
    other = make("--init-weights", "--seed", "1")
    assert (other / "model.safetensors").read_bytes() != weights


def test_the_100m_preset_has_at_least_100_million_parameters(make, capsys):
    out = make("--preset", "100m", "--bf16")
    config = AutoConfig.from_pretrained(out)
    assert str(config.dtype) == "torch.bfloat16"
    assert (config.hidden_size, config.head_dim) == (768, 64)
    assert float(capsys.readouterr().out.split()[-3]) >= 100
    assert not (out / "model.safetensors").exists()
