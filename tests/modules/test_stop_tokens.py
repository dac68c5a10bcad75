"""Which stop strings end a response as tokens?"""

import pytest
from transformers import AutoTokenizer

from chatlearn_vllm.engines.stop_tokens import with_stop_tokens
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.engines import policy_job
from tests.helpers.tiny_llama import save_tiny_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    """With a token of its own that is shown in texts, beside <pad>=0, <s>=1 and </s>=2."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def stops(tokenizer, strings, **sampling):
    sampling = {"stop": strings, "skip_special_tokens": True, **sampling}
    made = with_stop_tokens(sampling, tokenizer, "models.policy")
    return made["stop"], made.get("stop_token_ids")


def test_special_tokens_are_no_text(tokenizer) -> None:
    assert stops(tokenizer, ["~", "<pad>", "<tool>"]) == (["~", "<tool>"], [0])
    assert stops(tokenizer, ["</s>", "<s>"], stop_token_ids=[9]) == ([], [9, 2, 1])
    assert stops(tokenizer, ["~"], stop_token_ids=None) == (["~"], [])


def test_where_texts_show_them_nothing_changes(tokenizer) -> None:
    assert stops(tokenizer, ["<pad>", "<s>x"], skip_special_tokens=False) == (
        ["<pad>", "<s>x"],
        None,
    )


def test_a_stop_string_that_no_text_can_have_is_refused_before_an_engine_is_built(
    model_dir, tmp_path
) -> None:
    job = policy_job(tmp_path, model_dir, stop_token_list="~;Q:</s>")
    policy = VLLMPolicyInference("policy", job)
    rule = "models.policy: stop_token_list: 'Q:</s>' would never end a response, because '</s>' in"
    with pytest.raises(ValueError, match=rule) as refusal:
        policy.model_setup()
    assert "write '</s>' alone, or set skip_special_tokens: False" in str(refusal.value)
    assert policy._engine is None
