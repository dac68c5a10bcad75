"""Is a response's text, made in one go, what vLLM makes token by token?"""

import random

import pytest
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatlearn_vllm.engines.response_text import decoder_of, response_texts, without_text
from examples.megatron.make_tiny_llama import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, model_max_length=64)
    return AutoTokenizer.from_pretrained(directory)


def token_by_token(tokenizer, prompt: list[int], response: list[int], skip: bool) -> str:
    stream = DecodeStream(ids=prompt, skip_special_tokens=skip)
    return "".join(stream.step(tokenizer._tokenizer, token) or "" for token in response)


@pytest.mark.parametrize("skip", [True, False])
def test_text_is_that_of_a_stream_of_tokens(tokenizer, skip) -> None:
    decode = decoder_of(tokenizer, skip_special_tokens=skip)
    pick = random.Random(0)
    characters = [tokenizer.convert_tokens_to_ids(c) for c in "0123456789+-= ()"]
    euro = tokenizer.encode("€", add_special_tokens=False)
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    for _ in range(300):
        prompt = [tokenizer.bos_token_id, *pick.choices(characters, k=pick.randint(1, 12))]
        parts = [[token] for token in pick.choices(characters + specials, k=pick.randint(1, 12))]
        parts.insert(pick.randint(0, len(parts)), euro)
        response = [token for part in parts for token in part]
        # Perhaps cut in the middle of the euro sign.
        cuts = [response[: pick.randint(1, len(response))] for _ in range(3)]
        expected = [token_by_token(tokenizer, prompt, cut, skip) for cut in cuts]
        assert response_texts(decode, prompt, [*cuts, []]) == [*expected, ""]


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer that makes texts in its own way."""

    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).upper()


def test_a_tokenizer_that_makes_texts_in_its_own_way_is_asked(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer.encode("a b , c", add_special_tokens=False)
    for other in (
        Shouting.from_pretrained(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path, clean_up_tokenization_spaces=True),
    ):
        (text,) = decoder_of(other, skip_special_tokens=True)([ids])
        assert text == other.decode(ids, skip_special_tokens=True)
    assert decoder_of(Shouting.from_pretrained(tmp_path), skip_special_tokens=True)([ids]) == [
        tokenizer.decode(ids).upper()
    ]


def test_text_that_only_vllm_can_make_is_left_to_it() -> None:
    kept, keys = without_text({"stop": ["\n"], "n": 2})
    assert keys is None and "detokenize" not in kept
    kept, keys = without_text({"stop": [], "spaces_between_special_tokens": False})
    assert keys is None and "detokenize" not in kept
    fast, keys = without_text({"stop": [], "skip_special_tokens": False})
    assert fast["detokenize"] is False and keys.skip_special_tokens is False
