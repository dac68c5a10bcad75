"""Is a response's text, made in one go, what vLLM makes token by token?"""

import random
from functools import partial

import pytest
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from chatlearn_vllm.engines.response_text import response_text, without_text
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
    decode = partial(tokenizer.decode, skip_special_tokens=skip)
    pick = random.Random(0)
    characters = [tokenizer.convert_tokens_to_ids(c) for c in "0123456789+-= ()"]
    euro = tokenizer.encode("€", add_special_tokens=False)
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    for _ in range(300):
        prompt = [tokenizer.bos_token_id, *pick.choices(characters, k=pick.randint(1, 12))]
        parts = [[token] for token in pick.choices(characters + specials, k=pick.randint(1, 12))]
        parts.insert(pick.randint(0, len(parts)), euro)
        response = [token for part in parts for token in part]
        cut = response[: pick.randint(1, len(response))]  # perhaps in the middle of the euro sign
        expected = token_by_token(tokenizer, prompt, cut, skip)
        assert response_text(decode, prompt, cut) == expected
    assert response_text(decode, prompt, []) == ""


def test_text_that_only_vllm_can_make_is_left_to_it() -> None:
    kept, keys = without_text({"stop": ["\n"], "n": 2})
    assert keys is None and "detokenize" not in kept
    kept, keys = without_text({"stop": [], "spaces_between_special_tokens": False})
    assert keys is None and "detokenize" not in kept
    fast, keys = without_text({"stop": [], "skip_special_tokens": False})
    assert fast["detokenize"] is False and keys.skip_special_tokens is False
