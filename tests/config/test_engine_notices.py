"""Is it told which keys of an engine a model has no use for?"""

import pytest
import yaml

from chatlearn_vllm.config import load_config

URL = "http://localhost:8000"


def notices_of(tmp_path, name="policy", **model_args) -> list[str]:
    """What is told of one model with these keys, without its name."""
    trains = name.endswith("trainer")
    on_cpu = not trains and ("vllm_server" in model_args or name.startswith("reward"))
    model = {"num_cpu": 1} if on_cpu else {"num_gpu": 1, "trainable": trains}
    job = {"models": {name: model | {"model_args": model_args}}}
    job["runtime"] = {"sample_per_episode": 16}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    told = load_config(tmp_path / "job.yaml").notices
    return [line.removeprefix(f"models.{name}: no effect of ") for line in told]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"attn_implementation": "eager"}, "attn_implementation='eager'; of inference_engine: "
         "transformers; vLLM's own is attention_backend"),
        ({"length_penalty": 0.5}, "length_penalty=0.5; only beams, num_beams above 1, are compared "
         "by it"),
        ({"vllm_server_timeout": 5, "vllm_server_api_key": "secret-5"}, "vllm_server_timeout=5.0, "
         "vllm_server_api_key; only with inference_engine: server"),
        ({"vllm_server": URL, "sleep_level": 1, "dtype": "float16"}, "sleep_level=1, "
         "dtype='float16'; give them to the server when you start it"),
        ({"hf_token": "secret-6", "revision": "main"}, "revision, hf_token; `load` is a directory"),
        ({"override_generation_config": {"temperature": 0.1}}, "override_generation_config; every "
         "request says how it is sampled; set temperature, top_p, ... themselves"),
        ({"inference_engine": "transformers", "load_format": "gguf"}, "load_format='gguf'; vLLM's, "
         "and inference_engine is transformers"),
    ],
)  # fmt: skip
def test_a_key_that_another_engine_reads_is_told(tmp_path, given, told) -> None:
    assert notices_of(tmp_path, **given) == [told]


@pytest.mark.parametrize(
    "given",
    [
        {"attn_implementation": "eager", "inference_engine": "transformers"},
        {"length_penalty": 0.5, "eval_num_beams": 3},
        {"length_penalty": 1.0},
        {"vllm_server": URL, "vllm_server_timeout": 5, "dtype": "auto"},
        {"vllm_server_timeout": 1800},
        {"load_format": "npcache"},
        {"load_format": "safetensors", "inference_engine": "transformers"},
        {"sleep_level": 1},
    ],
)
def test_a_key_that_is_read_or_says_what_happens_anyway_is_not_told(tmp_path, given) -> None:
    assert notices_of(tmp_path, **given) == []


def test_the_older_key_of_beams_is_told_to_be_none_of_evaluations(tmp_path) -> None:
    beams = {"n": 2, "use_beam_search": True}
    told, of_training = notices_of(tmp_path, **beams)
    assert told == (
        "use_beam_search=True in evaluations; set eval_num_beams to the number of beams that they "
        "are to search"
    )
    assert "use_beam_search=True draws training responses from" in of_training
    assert len(notices_of(tmp_path, **beams, eval_num_beams=2)) == 1


def test_a_server_of_a_model_that_does_not_generate_is_told(tmp_path) -> None:
    (trainer,) = notices_of(tmp_path, "policy_trainer", vllm_server=URL)
    assert trainer == "vllm_server; a model that is trained calls no server"
    (reward,) = notices_of(tmp_path, "reward", vllm_server=URL)
    assert reward == "vllm_server; unless it generates: no other model calls a server"
