"""Which cases can be asked for, and how are they compared?"""

import json

import pytest

from chatlearn_vllm.bench.cases import Case, OptionError, check_cases, parse_case, ratios
from chatlearn_vllm.layouts import ModelShape

SHAPE = ModelShape.from_hf_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 128,
    }  # fmt: skip
)


@pytest.mark.parametrize(
    ("text", "case"),
    [
        ("transformers", Case("transformers")),
        ("transformers-flash:spec", Case("transformers-flash", speculative=True)),
        ("vllm:tp=2:pp=4", Case("vllm", 2, 4)),
        ("vllm-module:speculative:tp=4", Case("vllm-module", 4, 1, speculative=True)),
        ("vllm:logprobs:seeds", Case("vllm", logprobs=True, seeds=True)),
        (
            "vllm-module:tp=2:block_size=32:speculative_config.method=ngram_gpu",
            Case(
                "vllm-module", 2, settings=("block_size=32", "speculative_config.method=ngram_gpu")
            ),
        ),
    ],
)
def test_a_case_is_read(text, case):
    assert parse_case(text) == case
    assert parse_case(str(case)) == case
    assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case


def test_results_of_a_version_without_settings_are_read():
    values = Case("vllm", 2).to_dict()
    del values["settings"]
    assert Case.from_dict(values) == Case("vllm", 2)


def test_sizes_of_the_options_are_for_vllm_cases_that_name_none():
    sizes = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    assert parse_case("vllm", **sizes) == Case("vllm", 4, 2)
    assert parse_case("vllm:tp=1", **sizes) == Case("vllm", 1, 2)
    assert parse_case("transformers", **sizes) == Case("transformers")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vlm", "engine 'vlm' is not one of transformers, "),
        ("vllm:tp=0", "tp='0' must be a whole number >= 1"),
        ("vllm:tp=two", "tp='two' must be a whole number >= 1"),
        ("vllm:tp=2:tp=4", "tp has two values; keep one"),
        ("vllm:block_size=16:block_size=32", "block_size has two values; keep one"),
        ("transformers:block_size=16", "block_size=16 would be a key of vLLM's; take it off"),
        ("vllm:fast", "unknown variant 'fast'; cases are ENGINE"),
        ("transformers:tp=2", "transformers runs on one GPU here; take tp and pp off"),
        ("vllm-module:logprobs", "logprobs and seeds are variants of vllm"),
    ],
)
def test_a_case_that_cannot_be_is_refused(text, message):
    with pytest.raises(OptionError, match=message):
        parse_case(text)


def test_a_tensor_parallel_size_must_divide_the_gpus():
    check_cases([parse_case("vllm:tp=4:pp=2")], SHAPE, num_gpus=8)
    with pytest.raises(OptionError) as refusal:
        check_cases([parse_case("vllm:tp=4"), parse_case("vllm:tp=8")], SHAPE, num_gpus=6)
    first, second = str(refusal.value).splitlines()
    assert first == (
        "vllm:tp=4: tensor parallel size must divide the number of GPUs: 4 does not divide 6; set "
        "VLLM_TENSOR_PARALLEL_SIZE (tp=) to 1 or 2, or CUDA_VISIBLE_DEVICES to a multiple of it"
    )
    assert second.startswith("vllm:tp=8: tensor parallel size must divide the number of GPUs")


@pytest.mark.parametrize(
    ("case", "num_gpus", "message"),
    [
        ("vllm:tp=2:pp=4", 4, "2 x 4 = 8, more than the 4 visible GPUs"),
        (
            "vllm-module:tp=3",
            0,
            "must divide the model's 8 attention heads; set it to 1, 2, 4 or 8",
        ),
        ("vllm-module:tp=3", 0, "must divide the model's 4 key/value heads, or be a multiple"),
        ("vllm:speculative:pp=2", 8, "drafts are made on the last pipeline stage only"),
        ("vllm:pp=5", 8, "pipeline parallel size 5 is more than the model's 4 layers"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused(case, num_gpus, message):
    with pytest.raises(OptionError) as refusal:
        check_cases([parse_case(case)], SHAPE, num_gpus)
    assert message in str(refusal.value)


def measured(case: str, speed: float, status: str = "ok") -> dict:
    return {
        **parse_case(case).to_dict(), "status": status, "throughput": {"output_tokens_per_s": speed}
    }  # fmt: skip


def test_a_module_is_compared_with_bare_vllm_and_vllm_with_the_fastest_transformers_case():
    results = [
        measured("transformers", 50.0),
        measured("transformers-sdpa", 100.0),
        measured("transformers-flash", 0.0, status="skipped"),
        measured("vllm", 2000.0),
        measured("vllm:logprobs", 1960.0),
        measured("vllm:tp=2", 3000.0),
        measured("vllm-module", 1970.0),
    ]
    found = {(one["case"], one["to"]): one["ratio"] for one in ratios(results)}
    assert found == {
        ("vllm-module", "vllm"): 0.985,
        ("vllm-module", "vllm:logprobs"): 1970 / 1960,
        ("vllm", "transformers-sdpa"): 20.0,
        ("vllm:logprobs", "transformers-sdpa"): 19.6,
        ("vllm:tp=2", "transformers-sdpa"): 30.0,
        ("vllm-module", "transformers-sdpa"): 19.7,
    }
