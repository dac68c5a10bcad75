"""Is a trained policy served with an OpenAI API, to any client?

One real server, of a trainer's checkpoint, serves the slow tests of this file.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import openai
import psutil
import pytest
import torch
import transformers
import yaml
from vllm.config import ModelConfig

from chatlearn_vllm.cli import serve
from chatlearn_vllm.cli.main import main
from chatlearn_vllm.engines import vllm_serve
from chatlearn_vllm.engines.server_client import ServerClient, ServerError
from chatlearn_vllm.engines.server_process import serve_command
from chatlearn_vllm.engines.server_start import inspect_server
from chatlearn_vllm.engines.vllm_arguments import cpu_kv_cache_bytes
from chatlearn_vllm.layouts import ModelShape
from tests.helpers.ranks import Ranks
from tests.helpers.tiny_llama import save_tiny_llama

PROMPT = "What is 2 + 2?"

# As printed in a tutorial on GRPO with vLLM.
CURL = """
curl http://localhost:8000/v1/completions \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "Qwen/Qwen-7B",
    "prompt": "What is 2 + 2?",
    "max_tokens": 100,
    "temperature": 0.6
  }'
"""
CLIENT = """
import requests

response = requests.post(
    "http://localhost:8000/v1/completions",
    json={
        "model": "Qwen/Qwen-7B",
        "prompt": "Solve: 2x + 3 = 7",
        "max_tokens": 512,
        "temperature": 0.6,
    }
)

print(response.json()["choices"][0]["text"])
"""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no/such"], "CKPT=no/such: no such directory; a model of the .* by `vllm serve`"),
        (["."], "no checkpoint|no complete checkpoint"),
        ([".", "--port", "70000"], "--port 70000: must be from 1 to 65535"),
        ([".", "--tensor-parallel-size", "0"], "--tensor-parallel-size 0: must be >= 1"),
        ([".", "--dtype", "int8"], "--dtype int8: must be one of auto, half, float16, bfloat16, "),
        ([".", "--", "--speculative-model", "d"], "--speculative-model: .* --speculative-config"),
        ([".", "--weight-updates"], "set VLLM_API_KEY to a secret"),
        ([".", "--host", "300.1.1.1"], "--host 300.1.1.1 --port 8000: no server can listen there"),
        ([".", "--", "--config", "no.yaml"], "--config no.yaml: .*No such file"),
        ([".", "--", "--config=list.yaml"], "--config list.yaml: must hold a map of vLLM's flags"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_starts(
    arguments, message, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    Path("list.yaml").write_text("- dtype")
    assert main(["serve", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_heads_that_cannot_be_shared_are_told_before_anything_starts(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}')
    assert main(["serve", str(tmp_path), "--tensor-parallel-size", "4"]) == 2
    assert capsys.readouterr().err == (
        f"--tensor-parallel-size 4: must divide the 6 attention heads of {tmp_path}; "
        "set it to one of 1, 2, 3, 6\n"
    )


def test_a_port_that_is_in_use_is_told_before_anything_starts(tmp_path, capsys) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        on_loopback = ["--host", "127.0.0.1", "--port", str(port)]
        for where in (on_loopback, ["--port", str(port)]):
            assert main(["serve", str(tmp_path), *where]) == 2
            assert f"--port {port}: another process listens there" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), *on_loopback]) == 2
    told = capsys.readouterr().err  # of what comes next: the port is free now
    assert "checkpoint" in told and "--port" not in told


def test_a_server_that_takes_weights_has_one_key_and_its_own_address(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert main(["serve", str(tmp_path), "--weight-updates", "--", "--api-key", "other"]) == 2
    assert "--api-key: a server that takes weights has one key" in capsys.readouterr().err
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", str(tmp_path), "--weight-updates", "--port", port]) == 2
        assert "checkpoint" in capsys.readouterr().err  # of what comes next
        assert main(["serve", str(tmp_path), "--port", port]) == 2
        assert "another process listens there" in capsys.readouterr().err


def test_a_file_of_flags_counts_more_than_what_the_user_did_not_choose(tmp_path) -> None:
    given = {"served-model-name": "mine", "dtype": "bfloat16", "kv_cache_memory_bytes": 10**8}
    given |= {"enable-chunked-prefill": True, "port": 8123}
    file = tmp_path / "flags.yaml"
    file.write_text(yaml.safe_dump(given))
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    model = save_config(tmp_path, dtype="float32")
    for ours, port in ([], 8123), (["--port", "8124"], 8124):
        chosen = parser.parse_args([str(model), *ours])
        chosen.flags = ["--config", str(file)]
        command = serve_command(str(model), serve.vllm_arguments(chosen, model), chosen.flags)
        _, parsed = vllm_serve.parse(command[3:])
        assert (parsed.served_model_name, parsed.dtype, parsed.port) == (["mine"], "bfloat16", port)
        assert parsed.enable_chunked_prefill and parsed.kv_cache_memory_bytes == 10**8


@pytest.mark.parametrize("when", ["_export", "vllm_arguments"])
def test_a_signal_before_the_server_runs_leaves_no_directory(
    when, trained, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def told_to_end(*arguments):
        assert len([*tmp_path.iterdir()]) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(serve, when, told_to_end)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(trained / "checkpoints")])
    assert ended.value.code == 128 + signal.SIGTERM
    assert [*tmp_path.iterdir()] == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_heads_of_a_trainers_checkpoint_are_looked_at_too(trained, capfd) -> None:
    checkpoint = trained / "checkpoints"
    assert main(["serve", str(checkpoint), "--tensor-parallel-size", "3"]) == 2
    told = capfd.readouterr().err
    assert f"--tensor-parallel-size 3: must divide the 4 attention heads of {checkpoint}" in told


def save_config(directory: Path, **fields: str) -> Path:
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def test_the_command_is_that_of_vllm_with_the_users_flags(tmp_path) -> None:
    model = save_config(tmp_path, dtype="bfloat16")
    chosen = Namespace(
        checkpoint="run/ckpt", host=None, port=8001, tensor_parallel_size=2, dtype=None,
        served_model_name=None, weight_updates=False, flags=["--max-model-len", "32768"],
    )  # fmt: skip
    command = serve_command("/tmp/hf", serve.vllm_arguments(chosen, model), chosen.flags)
    on_cpu = []
    if not torch.cuda.is_available():
        room = ["--kv-cache-memory-bytes", str(cpu_kv_cache_bytes())]
        on_cpu = ["--no-enable-chunked-prefill", *room]
    assert command[2:] == [
        "chatlearn_vllm.engines.vllm_serve", "/tmp/hf", "--served-model-name", "run/ckpt", *on_cpu,
        "--port", "8001", "--tensor-parallel-size", "2", "--max-model-len", "32768",
    ]  # fmt: skip


# As printed in tutorials, those that older versions of vLLM took in the words of today; flags of
# `chatlearn-vllm serve` may stand before --.
DRAFT = json.dumps({"method": "draft_model", "model": "draft", "num_speculative_tokens": 5})


@pytest.mark.parametrize(
    ("ours", "flags", "expected"),
    [
        ("--host 0.0.0.0 --port 8000", ["--max-model-len", "32768", "--trust-remote-code"],
         {"host": "0.0.0.0", "port": 8000, "max_model_len": 32768, "trust_remote_code": True}),
        ("", ["--tensor-parallel-size", "8", "--host", "0.0.0.0", "--port", "8000"],
         {"tensor_parallel_size": 8, "host": "0.0.0.0", "port": 8000, "trust_remote_code": False}),
        ("--tensor-parallel-size 8", ["--pipeline-parallel-size", "4"],
         {"tensor_parallel_size": 8, "pipeline_parallel_size": 4}),
        ("", ["--quantization", "awq", "--tensor-parallel-size", "4"],
         {"quantization": "awq", "tensor_parallel_size": 4}),
        ("", ["--quantization", "gptq"], {"quantization": "gptq"}),
        ("--dtype half", ["--speculative-config", DRAFT],
         {"dtype": "half", "speculative_config": json.loads(DRAFT)}),
    ],
)  # fmt: skip
def test_flags_of_tutorials_reach_vllms_server(ours, flags, expected, tmp_path) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    chosen = parser.parse_args([str(tmp_path), *ours.split()])
    chosen.flags = flags
    model = save_config(tmp_path, dtype="bfloat16")
    command = serve_command(str(model), serve.vllm_arguments(chosen, model), flags)
    _, parsed = vllm_serve.parse(command[3:])
    assert parsed.model_tag == str(tmp_path)
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    "flags",
    ["--speculative-model draft", "--num-speculative-tokens 5", "--swap-space 4",
     "--use-v2-block-manager", "--disable-log-requests"],
)  # fmt: skip
def test_vllm_no_longer_has_the_flags_that_are_refused(flags, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        vllm_serve.parse([str(tmp_path), *flags.split()])
    assert f"unrecognized arguments: {flags}" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--", *flags.split()]) == 2
    assert f"{flags.split()[0]}: vLLM no longer has it" in capsys.readouterr().err


def test_a_server_that_takes_weights_is_on_this_host_and_tells_trainable_logprobs(
    tmp_path,
) -> None:
    model = save_config(tmp_path, dtype="float32")
    chosen = Namespace(
        checkpoint="hf", host=None, port=None, tensor_parallel_size=None, dtype="bfloat16",
        served_model_name="policy", weight_updates=True, flags=[],
    )  # fmt: skip
    arguments = serve.vllm_arguments(chosen, model)
    assert arguments["host"] == "127.0.0.1"
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["dtype"] == "bfloat16"
    chosen.flags = ["--logprobs_mode=raw_logprobs"]
    assert "logprobs_mode" not in serve.vllm_arguments(chosen, model)


@pytest.mark.parametrize(
    ("fields", "ours", "flags", "expected"),
    [
        ({"dtype": "float32"}, "", [], torch.float32),
        ({"torch_dtype": "float32"}, "", [], torch.float32),
        ({"dtype": "bfloat16"}, "", [], torch.bfloat16),
        ({"dtype": "float32"}, "--dtype bfloat16", [], torch.bfloat16),
        ({"dtype": "float32"}, "", ["--dtype", "bfloat16"], torch.bfloat16),
    ],
)
def test_a_model_is_served_in_the_type_of_its_checkpoint(
    fields, ours, flags, expected, tmp_path
) -> None:
    save_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    model = save_config(tmp_path, **(config | fields))
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    chosen = parser.parse_args([str(model), *ours.split()])
    chosen.flags = flags
    command = serve_command(str(model), serve.vllm_arguments(chosen, model), flags)
    _, parsed = vllm_serve.parse(command[3:])
    assert ModelConfig(model=parsed.model_tag, dtype=parsed.dtype).dtype == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory with `checkpoints` of a trainer and `hf`, the same weights."""
    from tests.megatron.test_export import train_and_save  # imports megatron-core

    root = tmp_path_factory.mktemp("trained")
    save_tiny_llama(root / "source", max_position_embeddings=1024)
    ranks = Ranks(1)
    try:
        ranks.run(train_and_save, root / "source", root, steps=1)
    finally:
        ranks.close()
    return root


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    temporary = tmp_path_factory.mktemp("temporary")
    log = tmp_path_factory.mktemp("log") / "serve.log"
    command = [
        sys.executable, "-m", "chatlearn_vllm.cli.main", "serve", "checkpoints",
        "--host", "localhost", "--port", str(port), "--",
        "--max-model-len", "600", "--max-num-seqs", "4", "--enforce-eager",
        "--kv-cache-memory-bytes", str(2**26), "--block-size", "32",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=trained, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )  # fmt: skip
    url = f"http://localhost:{port}"
    try:
        wait_for(url, process, log)
        watch = psutil.Process(process.pid)
        processes = [watch, *watch.children(recursive=True)]
        assert len(processes) >= 3, "the command, the API server and its engine"
        assert list(temporary.glob("*/model/config.json"))
        in_memory = shared_memory_of(processes)
        yield SimpleNamespace(url=url, process=process, log=log)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(40)
    assert process.returncode == 0
    _, alive = psutil.wait_procs(processes[1:], timeout=10)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    assert not list(temporary.glob("chatlearn_vllm-serve-*"))
    assert in_memory and not [path for path in in_memory if path.exists()]


def shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    paths = {memory.path for one in processes for memory in one.memory_maps()}
    return {Path(path) for path in paths if path.startswith("/dev/shm/")}


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.25)


@pytest.mark.slow
def test_the_openai_client_gets_what_the_trained_model_says(server, trained) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["checkpoints"]
    answer = client.completions.create(
        model="checkpoints", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=1
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "hf")
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = model.generate(tokens, do_sample=False, max_new_tokens=8)[0, tokens.size(1) :]
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    with torch.no_grad():
        logits = model(torch.cat([tokens[0], expected])[None]).logits[0, tokens.size(1) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, expected[:, None])[:, 0]
    # Attention on GPUs multiplies float32 as TF32.
    tolerance = 1e-2 if torch.cuda.is_available() else 1e-3
    got = answer.choices[0].logprobs.token_logprobs
    assert got == pytest.approx(logprobs.tolist(), abs=tolerance)


@pytest.mark.slow
def test_curl_and_requests_get_answers_as_printed(server) -> None:
    def here(text: str) -> str:
        return text.replace("http://localhost:8000", server.url).replace(
            "Qwen/Qwen-7B", "checkpoints"
        )

    command = ["bash", "-c", here(CURL).strip() + " --silent --fail"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["object"] == "text_completion" and answer["model"] == "checkpoints"
    assert answer["choices"][0]["index"] == 0
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert 0 < answer["usage"]["completion_tokens"] <= 100
    done = subprocess.run(
        [sys.executable, "-c", here(CLIENT)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()


@pytest.mark.slow
def test_a_job_refuses_the_logprobs_of_a_plain_server(server, trained) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    config = json.loads((trained / "hf" / "config.json").read_text())
    client = ServerClient(server.url, api_key=None, timeout_s=60, max_retries=0)
    with pytest.raises(ServerError, match="start it with --logprobs-mode processed_logprobs"):
        inspect_server(client, ModelShape.from_hf_config(config), 96, tokenizer.encode)
    client.close()


@pytest.mark.slow
def test_a_server_that_cannot_start_is_an_error_that_leaves_nothing(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "none"}')
    before = len(psutil.Process().children(recursive=True))
    done = subprocess.run(
        [sys.executable, "-m", "chatlearn_vllm.cli.main", "serve", str(tmp_path / "model")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode not in (0, 2), done.stderr[-2000:]
    assert len(psutil.Process().children(recursive=True)) == before
