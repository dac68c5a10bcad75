"""Which keys lead to a server, and what is refused of them before anything starts?"""

import pytest
import yaml

from chatlearn_vllm.config import ConfigError, load_config

URL = "http://localhost:8000"


def load(tmp_path, *, num_cpu=0, num_gpu=0, sample_per_episode=16, **model_args):
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(model_args))
    devices = {"num_gpu": num_gpu} if num_gpu else {"num_cpu": num_cpu or 1}
    policy = devices | {"model_config_file": "policy.yaml"}
    job = {"models": {"policy": policy}, "runtime": {"sample_per_episode": sample_per_episode}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return load_config(tmp_path / "job.yaml").models["policy"].model_args


def test_the_keys_of_a_grpo_example_lead_to_a_server(tmp_path) -> None:
    args = load(
        tmp_path, vllm_server=URL, use_vllm=True, num_generations=16, temperature=0.6, top_p=0.95,
        max_completion_length=2048, seq_length=4096,
    )  # fmt: skip
    assert (args.inference_engine, args.vllm_server) == ("server", (URL,))
    assert (args.num_inference_per_prompt, args.max_new_tokens) == (16, 2048)


@pytest.mark.parametrize(
    "given, engine",
    [
        ({}, "vllm"),
        ({"use_vllm": True}, "vllm"),
        ({"use_vllm": False}, "transformers"),
        ({"vllm_server": "start"}, "server"),
        ({"inference_engine": "server", "vllm_server": URL}, "server"),
    ],
)
def test_the_engine_follows_from_the_keys(tmp_path, given, engine) -> None:
    assert load(tmp_path, **given).inference_engine == engine


def test_a_key_is_never_shown(tmp_path) -> None:
    for key in ("secret-5", 12345):
        args = load(tmp_path, vllm_server=URL, vllm_server_api_key=key)
        assert args.vllm_server_api_key.get_secret_value() == str(key)
        assert str(key) not in f"{args!r} {args} {args.model_dump_json()}"
    for mistake in (
        {"vllm_server": URL, "vllm_server_api_key": ["secret-5"]},
        {"vllm_server": URL, "vllm_server_api_key": "secret-5\n"},
        {"vllm_server": URL, "vllm_server_apikey": "secret-5"},
        {"vllm_server": "http://me:secret-5@host:1"},
        {"vllm_server": ["http://me:secret-5@p@host:1"]},
    ):
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, **mistake)
        assert "***" in str(caught.value) and "secret-5" not in str(caught.value)


def test_a_server_that_the_job_starts_may_have_several_devices(tmp_path) -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    args = load(tmp_path, vllm_server="start", num_gpu=4, **sizes)
    assert (args.tensor_model_parallel_size, args.inference_engine) == (2, "server")


def test_keys_of_an_engine_in_the_job_are_named_where_a_server_elsewhere_answers(tmp_path) -> None:
    load(tmp_path, vllm_server=URL, gpu_memory_utilization=0.4, block_size=16)
    told = (
        "models.policy: no effect of gpu_memory_utilization=0.4, block_size=16; give them to the "
        "server when you start it"
    )
    assert load_config(tmp_path / "job.yaml").notices == (told,)
    load(tmp_path, vllm_server="start", num_gpu=1, gpu_memory_utilization=0.4)
    assert load_config(tmp_path / "job.yaml").notices == ()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"inference_engine": "server"}, "server needs vllm_server: the server's URL, or `start`"),
        (
            {"inference_engine": "vllm", "vllm_server": URL},
            "is not used with inference_engine: vllm; leave it out, or set inference_engine: serv",
        ),
        ({"use_vllm": False, "inference_engine": "vllm"}, "contradicts inference_engine: vllm"),
        ({"use_vllm": True, "inference_engine": "transformers"}, "contradicts inference_engine"),
        ({"vllm_server": 8000}, "must be the URL of a server, a list of URLs, or `start`"),
        ({"vllm_server": []}, "must be the URL of a server, a list of URLs, or `start`"),
        ({"vllm_server": "localhost:8000"}, "is no http or https URL; write http://HOST:PORT"),
        ({"vllm_server": f"{URL}/v1"}, "must have no path after the port"),
        ({"vllm_server": "http://me:pw@host:1"}, "must hold no key"),
        ({"vllm_server": "http://host:99999"}, "Port out of range"),
        ({"vllm_server": [URL, URL.replace("8000", "8001")]}, "names 2 servers for 1 replicas"),
        ({"vllm_server": [URL, f"{URL}/"], "num_cpu": 2}, "names a server twice"),
        ({"vllm_server": ["http://a:1", "http://A:1"], "num_cpu": 2}, "names a server twice"),
        ({"vllm_server": ["http://a", "HTTP://a:80"], "num_cpu": 2}, "names a server twice"),
        (
            {"vllm_server": ["http://127.0.0.1:1", "http://localhost:1"], "num_cpu": 2},
            "names a server twice",
        ),
        ({"vllm_server": f"{URL}\n"}, "is no http or https URL"),
        ({"vllm_server": URL, "flat_logprobs": True}, "sampling keys of vLLM's completions API"),
        ({"vllm_server": URL, "kv_cache_memory_bytes": 9}, "start it with --kv-cache-memory-bytes"),
        (
            {"vllm_server": URL, "num_gpu": 2, "tensor_model_parallel_size": 2},
            "tensor_model_parallel_size=2: is up to the server; leave it out here",
        ),
        (
            {"vllm_server": "start", "num_cpu": 2, "tensor_model_parallel_size": 2},
            "takes a device for each of its 2 ranks; set num_gpu: 4 in place of num_cpu",
        ),
        (
            {"vllm_server": "start", "num_gpu": 3, "tensor_model_parallel_size": 2},
            "num_gpu=3: must be a multiple of tensor_model_parallel_size",
        ),
        (
            {
                "vllm_server": "start",
                "num_gpu": 4,
                "tensor_model_parallel_size": 4,
                "num_attention_heads": 6,
            },
            "a tensor parallel size of 4 must divide the 6 attention heads of the model",
        ),
        (
            {"vllm_server": URL, "eval_num_beams": 4},
            "eval_num_beams=4: needs an engine in the job's own processes",
        ),
        (
            {"vllm_server": URL, "use_beam_search": True, "num_generations": 2},
            "use_beam_search=True: needs an engine in the job's own processes",
        ),
        ({"vllm_server": URL, "num_generations": 3}, "must be a multiple of 3"),
        ({"vllm_server": URL, "num_generations": 2, "num_inference_per_prompt": 2}, "older name"),
    ],
)
def test_what_contradicts_is_refused(tmp_path, given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **given)
