"""Is a response's text, made in one go or beside Transformers, what vLLM makes token by token?"""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatlearn_vllm.engines.hf_sampling import HFSampling, Row, StopTokens
from chatlearn_vllm.engines.request_output import Logprob
from chatlearn_vllm.engines.response_text import decoder_of, response_texts, without_text
from examples.megatron.make_tiny_llama import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, model_max_length=64)
    return AutoTokenizer.from_pretrained(directory)


def vllms_text(tokenizer, prompt: list[int], response: list[int], skip: bool = True) -> str:
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    sampling = SamplingParams(skip_special_tokens=skip)
    request = SimpleNamespace(request_id="r", prompt_token_ids=prompt, sampling_params=sampling)
    detokenizer = FastIncrementalDetokenizer(tokenizer, request)
    for token in response:
        detokenizer.update([token], stop_terminated=False)
    return detokenizer.output_text


def text_beside_transformers(tokenizer, prompt: list[int], response: list[int]) -> str:
    sampling = HFSampling()
    row = Row(
        prompt, sampling, StopTokens.of(sampling, None, ()), index=0, max_tokens=len(response),
        generator=torch.Generator(), tokenizer=tokenizer,
    )  # fmt: skip
    for token in response:
        row.add(token, {token: Logprob(0.0)})
    return row.completion().text


def ids_of(tokenizer, *parts: str | list[int]) -> list[int]:
    """Tokens of texts, and those of single bytes."""
    ids = []
    for part in parts:
        if isinstance(part, str):
            ids += tokenizer.encode(part, add_special_tokens=False)
        else:
            ids += tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in part])
    return ids


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
        expected = [vllms_text(tokenizer, prompt, cut, skip) for cut in cuts]
        assert response_texts(decode, prompt, [*cuts, []]) == [*expected, ""]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["The answer\n", [0xE4]], "The answer\n"),
        (["The answer\n", [0xF0, 0x9F, 0x98]], "The answer\n"),
        (["1\n", [0xE2, 0x82, 0xAC]], "1\n€"),
        (["1\n", [0xE2, 0x82, 0xAC, 0xE4, 0xB8]], "1\n€"),
        (["1\n", [0xE4, 0xF0, 0x9F, 0xE4, 0xB8]], "1\n"),
        ([[0xE4, 0xB8]], ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prompt", ["12+34=", "The answer"])
def test_bytes_before_an_unfinished_character_stay(tokenizer, prompt, parts, text) -> None:
    # "The answer" is made of bytes, too: those of the prompt and of the response are one run.
    prompt, response = tokenizer.encode(prompt), ids_of(tokenizer, *parts)
    assert vllms_text(tokenizer, prompt, response) == text
    decode = decoder_of(tokenizer, skip_special_tokens=True)
    one = ids_of(tokenizer, "1")
    assert response_texts(decode, prompt, [one, response, one]) == ["1", text, "1"]
    assert text_beside_transformers(tokenizer, prompt, response) == text


def test_a_bad_byte_does_not_end_a_rollout_of_transformers(tokenizer) -> None:
    prompt = tokenizer.encode("12+34=")
    for parts, text in (
        (([0x0A, 0xE4], "1"), "\n1"),
        (("The answer\n", [0xE4], "46\n", [0xE4], "7"), "The answer\n46\n7"),
    ):
        response = ids_of(tokenizer, *parts)
        assert vllms_text(tokenizer, prompt, response) == text
        assert text_beside_transformers(tokenizer, prompt, response) == text


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
