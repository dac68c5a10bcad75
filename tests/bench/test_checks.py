"""What is refused before an engine starts, and in which words?"""

import json

import pytest

from chatlearn_vllm.bench.cases import OptionError
from chatlearn_vllm.bench.checks import check_workload
from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.workload import config_of, made_config
from chatlearn_vllm.cli.main import main


def model(directory, *files, **config):
    """A directory with a model's config.json, and empty files, of which one is a tokenizer."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(made_config("tiny", 1024) | config))
    for name in ("tokenizer.json", *files):
        (directory / name).touch()
    return str(directory)


def prompt_file(directory, texts):
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def check(*cases, **options):
    checked = BenchOptions.of({"cases": cases or ("vllm",), **options})
    return check_workload(checked, checked.parsed_cases(), config_of(checked))


@pytest.mark.parametrize(
    ("num_texts", "cases", "is_told"),
    [(20, ["vllm"], False), (19, ["vllm"], True), (19, ["transformers"], False)],
)
def test_a_file_with_fewer_prompts_than_all_passes_take_is_told(
    tmp_path, num_texts, cases, is_told
):
    texts = [f"prompt {number}" for number in range(num_texts)]
    notices = check(
        *cases, model=model(tmp_path), prompt_file=prompt_file(tmp_path, texts),
        prompts=4, repeat=2, warmup=1, latency_requests=4,
    )  # fmt: skip
    assert len(notices) == is_told
    if is_told:
        assert "holds 19 different prompts, all passes take 20" in notices[0]


def test_what_the_job_of_a_vllm_case_refuses_is_said_in_words_of_options():
    check("transformers", temperature=3.0)
    with pytest.raises(OptionError) as refusal:
        check("vllm", "vllm-module", temperature=3.0)
    assert str(refusal.value) == "--temperature=3.0: must be at most 2, vLLM takes no higher one"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "vllm:blocksize=32",
            "blocksize must be an engine argument of vLLM; did you mean block_size?",
        ),
        ("vllm:temperature=0.5", "temperature must be an engine argument of vLLM"),
        ("vllm-module:max_num_seqs=8", "max_num_seqs has a place of its own; use --max-num-seqs"),
        ("vllm:tensor_parallel_size=2", "tensor_parallel_size has a place of its own; use tp=N"),
        (
            "vllm:speculative:speculative_config.model=DIR",
            "speculative_config.model has a place of its own; use --draft",
        ),
        (
            "vllm:speculative_config.method=ngram_gpu",
            "speculative_config.method has no effect without speculative; add it to the case",
        ),
        ("vllm:block_size=many", "block_size: must be a valid integer"),
        (
            "vllm-module:speculative:speculative_config.method=ngrm",
            "speculative_config.method: must be one of vLLM's methods that draft tokens: ngram, ",
        ),
    ],
)
def test_a_setting_that_a_case_cannot_have_is_refused(case, message):
    with pytest.raises(OptionError) as refusal:
        check(case)
    assert str(refusal.value).startswith(f"{case}: {message}")


def test_a_draft_with_another_vocabulary_is_refused(tmp_path):
    draft = model(tmp_path / "draft", "model.safetensors", vocab_size=300)
    for case in ("vllm:speculative", "vllm-module:speculative", "transformers:speculative"):
        with pytest.raises(OptionError) as refusal:
            check(case, draft=draft)
        assert str(refusal.value).startswith(f"--draft={draft}: drafts from a vocabulary of 300")
        assert str(refusal.value).endswith("512; take a draft with the model's tokenizer")


def test_a_draft_without_weights_is_refused(tmp_path):
    draft = model(tmp_path / "draft", "training_args.bin")
    check("vllm", draft=draft)
    with pytest.raises(OptionError, match="no weights there, and a draft of random ones agrees"):
        check("vllm:speculative", draft=draft)
    (tmp_path / "draft/config.json").write_text("{")
    with pytest.raises(OptionError, match=f"--draft={draft}: must hold a JSON object"):
        check("vllm:speculative", draft=draft)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantised_weights_cannot_be_random(tmp_path, method):
    path = model(tmp_path / "m", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(OptionError, match=rf"config.json says .* quantised \({method}\), but"):
        check("vllm", model=path)


@pytest.mark.parametrize(
    ("case", "config", "options", "message"),
    [
        ("vllm", {}, {"max_model_len": 1025}, r"LEN\)=1025 is more than the 1024 positions of"),
        ("vllm", {}, {"max_model_len": 1024}, None),
        ("transformers", {}, {"max_model_len": 4096}, None),
        ("transformers", {}, {"max_tokens": 1000}, "--max-tokens=1000 are together more than the"),
        (
            "vllm", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            {"max_model_len": 4096}, None,
        ),
        (
            "vllm", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            {"max_model_len": 4096}, "=4096 is more than the 1024 positions",
        ),
    ],
)  # fmt: skip
def test_more_tokens_than_the_model_has_positions_are_refused(
    tmp_path, case, config, options, message
):
    path = model(tmp_path / "m", **config)
    if message is None:
        check(case, model=path, **options)
        return
    with pytest.raises(OptionError, match=message):
        check(case, model=path, **options)


def test_texts_need_a_tokenizer_and_whole_characters(tmp_path):
    path = model(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").unlink()
    prompts = prompt_file(tmp_path, ["fine", "half \ud83d"])
    with pytest.raises(OptionError) as refusal:
        check("transformers", model=path, prompt_file=prompts, prompts=2)
    assert str(refusal.value).splitlines() == [
        f"--model={path}: no tokenizer there, without which --prompt-file cannot be; copy one into "
        "it",
        f"--prompt-file={prompts}: prompt 2 has \\ud83d, half of a character, which no tokenizer "
        "reads; write the whole character, or leave it out",
    ]


def test_vllm_needs_a_tokenizer(tmp_path):
    path = model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    check("transformers", model=path)
    with pytest.raises(OptionError, match="no tokenizer there, without which vllm, vllm-module"):
        check("vllm", "transformers", "vllm-module", model=path)


def test_random_prompts_need_a_vocabulary(tmp_path):
    with pytest.raises(OptionError, match="vocab_size=3, but prompts are of random token ids"):
        check("transformers", model=model(tmp_path / "m", vocab_size=3))


def test_the_command_refuses_before_the_first_case(tmp_path, capsys):
    arguments = ["transformers", "vllm", "--temperature", "3", "--out", str(tmp_path / "out")]
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("--temperature=3.0: must be at most 2")
    assert not (tmp_path / "out").exists()


def test_options_about_drafts_without_a_case_that_drafts_are_told(tmp_path):
    draft = model(tmp_path / "draft", "model.safetensors")
    assert check("vllm", draft=draft) == [
        f"--draft={draft} has no effect without a case with :speculative, as in vllm:speculative"
    ]
    assert check("vllm:speculative", draft=draft, draft_sample_method="probabilistic") == []
    (notice,) = check("vllm:speculative", draft_sample_method="probabilistic")
    assert notice.startswith("--draft-sample-method=probabilistic has no effect without --draft")


def test_what_changes_nothing_is_told():
    assert check("vllm", "transformers", hf_batch_size="2") == []
    (notice,) = check("vllm", "vllm-module:speculative", hf_batch_size="2")
    assert notice == "--hf-batch-size=2 has no effect without a transformers case"
    (notice,) = check("vllm", "vllm-module", "vllm")
    assert notice == "vllm: asked for more than once, measured once; see --rounds"
