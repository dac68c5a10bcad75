"""What may be asked of an engine, and what is its user told before anything starts?"""

import json
from pathlib import Path

import pytest

from chatlearn_vllm.config import ConfigError, load_config
from chatlearn_vllm.config.engine_support import (
    FEATURES,
    NOT_TOGETHER,
    asked_for,
    cpu_problem,
)
from chatlearn_vllm.config.engine_tables import with_tables

ROOT = Path(__file__).parents[2]
AT = "command line: models.policy.model_args"


def overrides(*keys: str) -> list[str]:
    return [f"models.policy.model_args.{key}" for key in keys]


def policy_args(job, *keys: str):
    return load_config(job, overrides(*keys)).models["policy"].model_args


def problems_of(job, *keys: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(job, overrides(*keys), **options)
    return [str(problem).removeprefix(f"{AT}.") for problem in caught.value.problems]


@pytest.fixture
def models(write) -> Path:
    """Directories of models: a target, a draft with its vocabulary, and others."""
    for name, config in {
        "target": {"vocab_size": 100},
        "draft": {"vocab_size": 100},
        "foreign": {"vocab_size": 101},
        "awq": {"vocab_size": 100, "quantization_config": {"quant_method": "awq"}},
    }.items():
        path = write(f"{name}/config.json", json.dumps(config))
    return path.parents[1]


def test_the_documented_tables_are_those_of_the_checks() -> None:
    document = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
    assert document == with_tables(document), (
        "run: python -m chatlearn_vllm.config.engine_tables docs/engines.md"
    )
    known = FEATURES.keys()
    assert all({*clash.these, clash.other} <= known for clash in NOT_TOGETHER)


def test_older_spellings_mean_the_map(job, models) -> None:
    draft = str(models / "draft")
    args = policy_args(job, f"speculative_model={draft}", "num_speculative_tokens=5")
    assert args.speculative_config == {
        "method": "draft_model", "model": draft, "num_speculative_tokens": 5,
    }  # fmt: skip
    for name in ("[ngram]", "'[ngram]'", "ngram"):
        args = policy_args(job, f"speculative_model={name}", "num_speculative_tokens=5")
        assert args.speculative_config == {"method": "ngram", "num_speculative_tokens": 5}
    config = "{method: ngram, num_speculative_tokens: 2, prompt_lookup_max: 4}"
    args = policy_args(job, f"speculative_config={config}")
    assert args.speculative_config["prompt_lookup_max"] == 4
    assert policy_args(job).speculative_config is None


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (
            ["speculative_config={method: ngrm, num_spec_tokens: 3}"],
            [
                "speculative_config.num_spec_tokens=3: unknown field of vLLM's SpeculativeConfig; "
                "did you mean num_speculative_tokens?",
                "speculative_config.method='ngrm': must be one of vLLM's methods that draft "
                "tokens: ngram, ngram_gpu, suffix, draft_model, eagle, eagle3, medusa, "
                "mlp_speculator, dflash, mtp, dspark, custom_class; did you mean ngram?",
            ],
        ),
        (
            ["num_speculative_tokens=5"],
            [
                "speculative_config: method draft_model needs `model`: the directory of the "
                "draft's weights"
            ],
        ),
        (
            ["speculative_config={method: ngram, num_speculative_tokens: 2}",
             "num_speculative_tokens=3"],
            [
                "num_speculative_tokens=3: is the older name of num_speculative_tokens in "
                "speculative_config, which is given too; keep one"
            ],
        ),
        (
            ["speculative_config={method: ngram, num_speculative_tokens: 2, prompt_lookup_max: 2, "
             "prompt_lookup_min: 3}"],
            ["speculative_config.prompt_lookup_min=3: must be at most prompt_lookup_max=2"],
        ),
        (
            ["speculative_config={method: ngram_gpu, num_speculative_tokens: 2, "
             "num_speculative_tokens_per_batch_size: [[1, 64, 2]]}"],
            [
                "speculative_config.num_speculative_tokens_per_batch_size=[[1, 64, 2]]: vLLM's "
                "ngram_gpu makes drafts of one length only; leave it out, or set one of the "
                "methods ngram, draft_model, eagle, eagle3, mtp"
            ],
        ),
        (
            ["speculative_config={method: ngram, num_speculative_tokens: 2, prompt_lookup_max: x}"],
            ["speculative_config.prompt_lookup_max='x': must be a number of tokens, 1 or more"],
        ),
        (
            ["speculative_config={method: ngram, num_speculative_tokens: 2}",
             "disable_log_stats=True"],
            [
                "disable_log_stats=True: must be False with speculative_config: how many drafts "
                "are accepted is among vLLM's statistics; leave it out"
            ],
        ),
        (
            ["skip_tokenizer_init=True", "scheduling_policy=priority"],
            [
                "skip_tokenizer_init=True: leaves responses without text, stop strings and the "
                "tokenizer's end-of-sequence token without effect; leave it out",
                "scheduling_policy='priority': must be fcfs: no request has a priority here, and "
                "ranks of a replica, which schedule for themselves, would order equal ones "
                "differently; leave it out",
            ],
        ),
        (
            ["runner=pooling", "convert=embed"],
            [
                "runner='pooling': must be generate, for responses; leave it out",
                "convert='embed': must be none, for responses; leave it out",
            ],
        ),
        (
            ["tokens_only=True", "logprobs_mode=raw_logits", "enable_lora=True"],
            [
                "tokens_only=True: leaves responses without text and stop strings without effect; "
                "leave it out",
                "logprobs_mode='raw_logits': must be processed_logprobs or raw_logprobs: "
                "`logprobs` of responses are taken for log-probabilities, and logits are none; "
                "leave it out",
                "enable_lora=True: has no effect but slower steps: requests name no adapter, and a "
                "trainer's (lora_r) are merged at each weight sync; leave it out",
            ],
        ),
        (
            ["logprobs_mode=raw_logprob", "enforce_eager=True"],
            [
                "logprobs_mode='raw_logprob': must be one of vLLM's: raw_logits, raw_logprobs, "
                "processed_logits, processed_logprobs; did you mean raw_logprobs?"
            ],
        ),
        (
            ["speculative_config={method: ngram}"],
            [
                "speculative_config={'method': 'ngram'}: num_speculative_tokens must say how many "
                "tokens are drafted at a time, 1 or more"
            ],
        ),
        (
            ["speculative_config={method: ngram, num_speculative_tokens: 2, tensor_parallel_size: "
             "2, rejection_sample_method: synthetic}", "min_p=0.1", "logit_bias={3: 1.0}",
             "min_tokens=4"],
            [
                "speculative_config.tensor_parallel_size=2: is set by vLLM; say "
                "draft_tensor_parallel_size",
                "speculative_config.rejection_sample_method='synthetic': synthetic accepts drafts "
                "without looking at the model, so that responses and their log-probabilities are "
                "not the model's; leave it out",
                "min_p=0.1: must be 0 with speculative_config, which vLLM verifies without it; "
                "use top_p",
                "logit_bias={3: 1.0}: does not go with speculative_config, which vLLM verifies "
                "without it",
                "min_tokens=4: does not go with speculative_config, with which vLLM forbids end "
                "tokens for one token too long where drafts are accepted beyond the minimum; leave "
                "one of the two out",
            ],
        ),
        (
            ["speculative_config={method: ngram, num_speculative_tokens: 2, "
             "draft_sample_method: probabilistc}"],
            [
                "speculative_config.draft_sample_method='probabilistc': must be one of vLLM's: "
                "greedy, probabilistic; did you mean probabilistic?"
            ],
        ),
        (
            ["quantization=gptq"],
            [
                "quantization='gptq': is how the checkpoint in `load` is quantised, but "
                "load_format: dummy waits for the weights of a trainer, which are not; set "
                "quantization: fp8 for a model that is trained, load_format: auto for one that is "
                "not"
            ],
        ),
        (
            ["quantization=torchao", "inference_engine=transformers"],
            [
                "quantization='torchao': is vLLM's; leave it out, or set inference_engine: "
                "vllm"
            ],
        ),
        (
            ["quantization=torchao", "vllm_server=[http://host:1, http://host:2]"],
            [
                "quantization='torchao': is up to the server; leave it out here, and start the "
                "server with it"
            ],
        ),
        (
            ["quantization=torchao", "vllm_server=start"],
            [
                "quantization='torchao': is not passed on to a server that the job starts; leave "
                "it out, or start a server with it yourself and name its URL in vllm_server"
            ],
        ),
        (
            ["quantization=fp8", "weight_sync_path=direct"],
            [
                "weight_sync_path='direct': vLLM's parameters hold quantised weights then; set "
                "weight_sync_path: auto"
            ],
        ),
    ],
)  # fmt: skip
def test_problems(job, keys, lines) -> None:
    assert problems_of(job, *keys) == lines


def test_an_engine_that_is_to_give_memory_back_can_sleep(job) -> None:
    never = "enable_sleep_mode=False"
    stays = ["models.policy.free_memory=False", "models.policy.offload_weights=False"]
    load_config(job, [*stays, *overrides(never)])
    for key in ("free_memory", "offload_weights"):
        with pytest.raises(ConfigError, match="enable_sleep_mode=False: must be True where the"):
            load_config(job, [*stays, f"models.policy.{key}=True", *overrides(never)])


@pytest.mark.parametrize(
    "key",
    [
        "nnodes=2", "node_rank=1", "master_addr=10.0.0.1", "master_port=29500", "device_ids=[1]",
        "data_parallel_backend=ray", "data_parallel_rank=0", "data_parallel_external_lb=True",
    ],
)  # fmt: skip
def test_where_ranks_run_is_no_key_of_the_engine(job, key) -> None:
    [line] = problems_of(job, key)
    assert line.startswith(key.split("=")[0])
    assert line.endswith(": is set by the runtime; leave it out")


def test_vllms_flags_for_drafts_have_one_place(job) -> None:
    assert problems_of(job, "spec_model=/draft") == [
        "spec_model='/draft': is set by speculative_config; leave it out"
    ]


def test_a_draft_must_be_there_and_know_the_same_tokens(job, models) -> None:
    tokens = "num_speculative_tokens=3"
    assert problems_of(job, "speculative_model=/nowhere", tokens, check_files=True) == [
        "speculative_model='/nowhere': no such directory, or no config.json in it: /nowhere"
    ]
    foreign = f"speculative_model={models}/foreign"
    assert problems_of(job, f"load={models}/target", foreign, tokens) == [
        f"speculative_model='{models}/foreign': drafts from a vocabulary of 101 tokens, "
        f"{models}/target has 100; take a draft with the model's tokenizer, or set "
        "use_heterogeneous_vocab: True in speculative_config"
    ]
    policy_args(job, f"load={models}/target", f"speculative_model={models}/draft", tokens)


@pytest.mark.parametrize("name", ["gptq", "GPTQ", "Gptq_Marlin"])
def test_capital_letters_in_a_quantization_mean_the_same(job, name) -> None:
    (problem,) = problems_of(job, f"quantization={name}")
    assert problem.startswith(f"quantization='{name}': is how the checkpoint in `load` is")
    assert policy_args(job, "quantization=FP8").quantization == "fp8"
    assert policy_args(job, "quantization=''").quantization is None


def test_the_engine_in_the_job_takes_any_quantization_of_vllm(job) -> None:
    args = policy_args(job, "quantization=torchao", "load_format=runai_streamer")
    assert args.quantization == "torchao"


def test_drafts_that_are_drawn_take_no_seed_of_a_response(job, models) -> None:
    config = f"{{model: {models}/draft, num_speculative_tokens: 3}}"
    keys = (f"load={models}/target", f"speculative_config={config}")
    drawn = (*keys, "speculative_config.draft_sample_method=probabilistic")
    assert problems_of(job, *drawn, "seed_per_response=True") == [
        "speculative_config.draft_sample_method='probabilistic': must be greedy with "
        "seed_per_response: True, because vLLM draws drafts without the responses' seeds; set "
        "seed_per_response: False, with which whole rollouts repeat"
    ]
    policy_args(job, *drawn, "seed_per_response=False")
    assert problems_of(job, *drawn, "speculative_config.use_heterogeneous_vocab=True") == [
        "speculative_config.draft_sample_method='probabilistic': must be greedy with "
        "use_heterogeneous_vocab: True, where vLLM compares no probabilities; leave it out"
    ]


def test_a_draft_needs_room_in_a_step(job, models) -> None:
    keys = (f"speculative_model={models}/draft", "num_speculative_tokens=3", "max_num_seqs=8")
    assert problems_of(job, *keys, "max_num_batched_tokens=8") == [
        "max_num_batched_tokens=8: must be more than max_num_seqs=8: a draft model takes a token "
        "of each running sequence for itself; verifying all of them in one step takes 40"
    ]
    policy_args(job, *keys, "max_num_batched_tokens=9")


def test_a_draft_is_split_as_the_model_is(job, models) -> None:
    config = f"{{model: {models}/draft, num_speculative_tokens: 3, draft_tensor_parallel_size: 1}}"
    lines = problems_of(job, f"speculative_config={config}", "tensor_model_parallel_size=2")
    assert lines == [
        "speculative_config.draft_tensor_parallel_size=1: must be 2, as "
        "tensor_model_parallel_size is 2; leave it out"
    ]


def test_drafts_do_not_go_with_pipeline_stages(job) -> None:
    config = "speculative_config={method: ngram, num_speculative_tokens: 3}"
    [line] = problems_of(job, config, "pipeline_model_parallel_size=2")
    assert "drafts are made on the last pipeline stage only" in line
    assert "set pipeline_model_parallel_size: 1" in line


def test_a_quantised_checkpoint_must_be_one(job, models) -> None:
    auto = "load_format=auto"
    policy_args(job, f"load={models}/awq", "quantization=awq", auto)
    [line] = problems_of(job, f"load={models}/target", "quantization=awq", auto)
    assert "config.json has no quantization_config; leave the key out" in line
    [line] = problems_of(job, f"load={models}/awq", "quantization=gptq", auto)
    assert "config.json has quant_method=awq" in line
    [line] = problems_of(job, f"load={models}/awq")
    assert "the weights are quantised (awq), a trainer's are not; set load_format: auto" in line


def test_vllms_names_of_types(job) -> None:
    names = {"half": "float16", "float": "float32", "float16": "float16", "bfloat16": "bfloat16"}
    for name, dtype in names.items():
        assert policy_args(job, f"dtype={name}").dtype == dtype


def test_what_runs_on_gpus_only_is_refused_elsewhere(job) -> None:
    for key, title in (
        ("quantization=fp8", "weights quantised to fp8 (quantization) works on GPUs only"),
        (
            "speculative_config={method: ngram_gpu, num_speculative_tokens: 2}",
            "drafts: n-grams, found on the GPU (speculative_config) works on GPUs only; set method",
        ),
    ):
        loaded = load_config(job, overrides(key))
        problem = cpu_problem(loaded.models["policy"], loaded.runtime)
        assert problem.startswith(f"models.policy: {title}")
    loaded = load_config(job)
    assert cpu_problem(loaded.models["policy"], loaded.runtime) is None
    assert asked_for(loaded.models["policy"], loaded.runtime) == []
