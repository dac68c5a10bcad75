"""Does a policy generate with a vLLM server as with an engine of its own, new weights included?

One real `vllm serve`, started by the module as in a job, serves most tests of this file.
"""

import dataclasses
import http.client
import json
import os
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import torch
import transformers

from chatlearn_vllm import VLLMModule
from chatlearn_vllm.engines.generation_engine import EngineStateError
from chatlearn_vllm.engines.server_client import ServerClient, ServerError
from chatlearn_vllm.engines.server_engine import _output, _Request
from chatlearn_vllm.engines.server_start import _probe_logprobs, inspect_server
from tests.helpers.engines import (
    SEQ_LENGTH,
    build_policy,
    change_model_args,
    policy_job,
    put_weights,
    start_policy,
)
from tests.helpers.ranks import Ranks
from tests.helpers.tiny_llama import save_tiny_llama

PROMPTS = ["12+34=", "a", "The sum of 1 and 2 is", "0" * 40, "x y z"]
SAMPLING = {"max_tokens": 12, "seed": 5, "n": 1, "temperature": 1.0, "logprobs": 0}


class Policy(VLLMModule):
    """The defaults, with the batches that pass through the hook noted."""

    def setup(self):
        self.batches = []
        super().setup()

    def build_dataset(self, train_prompts, is_eval=False):
        return super().build_dataset(train_prompts, is_eval)

    def model_provider(self):
        return super().model_provider()

    def _add_request(self, data, is_eval=False):
        return super()._add_request(data, is_eval)

    def forward_step(self, data, iteration=0):
        self.batches.append([group.token_chunk_size for group in data["seq_group_metadata_list"]])
        return self.execute_step(data)

    def decode_internal(self, batched_outputs):
        return super().decode_internal(batched_outputs)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one shape and unlike weights; the first one's directory is `load`.

    Their embeddings are tied, which vLLM on CPU would not update if its weights were packed.
    """
    directories = [tmp_path_factory.mktemp(f"model{seed}") for seed in range(2)]
    made = [
        save_tiny_llama(directory, tied=True, seed=seed)
        for seed, directory in enumerate(directories)
    ]
    for model, directory in zip(made, directories, strict=True):
        model.directory = directory
    return made


def job_of(model_dir, directory, **model_args):
    job = policy_job(
        directory, model_dir, n=3, temperature=0.7, eval_temperature=0.0, top_p=0.9,
        stop_token_list="~;@", **model_args,
    )  # fmt: skip
    runtime = job.runtime.model_copy(update={"output_dir": str(directory)})
    return job.model_copy(update={"runtime": runtime})


def with_prompts(module):
    module.build_prompts(PROMPTS)
    module.build_prompts(PROMPTS, is_eval=True)
    return module


def start(models, directory, **model_args):
    return with_prompts(start_policy(Policy, job_of(models[0].directory, directory, **model_args)))


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    module = start(models, tmp_path_factory.mktemp("served"), vllm_server="start")
    with pytest.raises(EngineStateError, match="the engine is DUMMY, it must be READY"):
        module.generate([0], first_sample=0)
    with pytest.raises(ServerError, match="has no weights of the job"):
        module.engine.finish_weight_update(1)
    yield module
    module.shutdown()


@pytest.fixture(scope="module")
def in_process(models, tmp_path_factory):
    return start(models, tmp_path_factory.mktemp("own"))


@pytest.fixture
def ready(served, models):
    """The policy with the first model's weights, and nothing under way."""
    put_weights(served, models[0], version=1)
    served.batches.clear()
    return served


@pytest.fixture
def engine(ready):
    return ready.engine


@pytest.fixture
def client(engine):
    """A client beside the engine's own."""
    client = ServerClient(
        engine._client.url, api_key=engine._process.api_key, timeout_s=30, max_retries=0
    )
    yield client
    client.close()


def test_answers_are_those_of_an_engine_in_the_process_before_and_after_a_sync(
    served, in_process, models
) -> None:
    for version, model in enumerate([*models, models[0]], start=1):
        for module in (served, in_process):
            put_weights(module, model, version)
        for is_eval in (False, True):
            indices = list(range(len(PROMPTS)))
            ours = served.generate(indices, first_sample=9, is_eval=is_eval)
            theirs = in_process.generate(indices, first_sample=9, is_eval=is_eval)
            assert ours.keys() == theirs.keys()
            assert torch.equal(ours["all_tokens"], theirs["all_tokens"])
            assert ours["str_outputs"] == theirs["str_outputs"]
            assert torch.equal(ours["loss_mask"], theirs["loss_mask"])
            torch.testing.assert_close(ours["logprobs"], theirs["logprobs"], atol=1e-5, rtol=1e-5)
            assert ours["weight_version"].tolist() == [version] * (5 if is_eval else 15)


def test_logprobs_of_prompts_and_stop_tokens_are_those_of_an_engine_in_the_process(
    ready, in_process, models, monkeypatch
) -> None:
    put_weights(in_process, models[0], version=1)
    keys = {
        "prompt_logprobs": 1, "stop_token_list": "~;<pad>",
        "sampling_args": {"logit_bias": {0: 3.0}},
    }  # fmt: skip
    batches = []
    for module in (ready, in_process):
        change_model_args(monkeypatch, module, **keys)
        batches.append(module.generate([0, 2], first_sample=0))
    ours, theirs = batches
    assert torch.equal(ours["all_tokens"], theirs["all_tokens"])
    torch.testing.assert_close(ours["logprobs"], theirs["logprobs"], atol=1e-5, rtol=1e-5)
    assert (ours["logprobs"][:, 0] < 0).all()  # of a prompt's second token
    assert (ours["all_tokens"][ours["loss_mask"] == 1] == 0).any()


def test_the_hook_sees_each_batch_of_requests_once(ready) -> None:
    ready.generate([0, 1], first_sample=0)
    ready.generate([2], first_sample=6)
    assert ready.batches == [[6, 1], [21]]


def test_enough_answers_are_returned_while_the_server_works_on_the_others(engine, client) -> None:
    engine.add_request("early", None, [5, 6], SAMPLING)
    engine._send_queued()
    engine._requests["early"].answer.result(30)
    client.post("/pause?mode=keep")
    engine.add_request("late", None, [5, 6], SAMPLING | {"max_tokens": 60})
    try:
        assert [output.request_id for output in engine.run(min_finished=1)] == ["early"]
        assert engine.requests == ("late",)
    finally:
        client.post("/resume")
    engine.add_request("new", None, [7], SAMPLING | {"max_tokens": 1})
    assert [output.request_id for output in engine.run()] == ["late", "new"]
    assert engine.requests == ()


def test_aborted_requests_end_on_the_server_too(engine) -> None:
    for number in range(4):
        engine.add_request(
            str(number), None, [5], SAMPLING | {"max_tokens": 90, "ignore_eos": True}
        )
    engine._send_queued()
    engine.abort()
    assert engine.requests == ()
    deadline = time.monotonic() + 10
    while engine.metrics()["vllm:num_requests_running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "token_ids, sampling, message",
    [
        ([], {}, "the prompt is empty"),
        ([100], {}, "token 100 is outside the vocabulary of 100 tokens"),
        ([5] * 90, {}, "90 tokens of the prompt and max_tokens=12 exceed .* max_model_len=96"),
        ([5], {"detokenize": False}, "completions API does not take detokenize"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_at_once(
    engine, token_ids, sampling, message
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.add_request("r", None, token_ids, SAMPLING | sampling)
    assert engine.requests == ()


def test_what_the_server_refuses_is_told_and_drops_the_batch(engine) -> None:
    engine.add_request("r", None, [5], SAMPLING | {"allowed_token_ids": [5000]})
    with pytest.raises(ValueError, match="the server refuses the request: .*5000|vocab"):
        engine.run()
    assert engine.requests == ()


def test_an_incomplete_checkpoint_leaves_the_engine_stale_until_a_whole_one_comes(
    ready, models
) -> None:
    tensors = dict(models[1].named_parameters())
    last, value = tensors.popitem()
    with pytest.raises(ValueError, match=f"1 tensors did not come: {last}"):
        ready.engine.load_weights(tensors.items())
    assert ready.engine_state() == "STALE(1)"
    with pytest.raises(EngineStateError, match="it must be READY"):
        ready.generate([0], first_sample=0)
    ready.engine.load_weights([*tensors.items(), (last, value)])
    ready.engine.finish_weight_update(2)
    assert ready.generate([0], first_sample=0)["weight_version"].tolist() == [2, 2, 2]


def test_a_server_that_an_earlier_job_left_paused_needs_weights_first(ready, client) -> None:
    tokenize = ready.tokenizer.tokenizer.encode
    client.post("/pause?mode=wait")
    try:
        assert inspect_server(client, ready.engine._shape, SEQ_LENGTH, tokenize).is_paused
    finally:
        client.post("/resume")


def test_weights_do_not_change_under_requests_of_the_job(engine, models) -> None:
    engine.add_request("r", None, [5], SAMPLING)
    with pytest.raises(EngineStateError, match="1 requests are under way"):
        engine.load_weights(models[1].named_parameters())
    assert str(engine.state) == "READY(1)"
    assert [output.request_id for output in engine.run()] == ["r"]


@pytest.mark.parametrize("version", [7, 1])
def test_weights_of_somebody_else_are_noticed(engine, client, version) -> None:
    given = {"method": "chatlearn_set_version", "kwargs": {"version": version}}
    client.post("/collective_rpc", given)
    engine.add_request("r", None, [5], SAMPLING)
    happened = rf"no longer has the weights of version 1.* was given others .*\[{version}\]"
    with pytest.raises(EngineStateError, match=happened):
        engine.run()
    assert str(engine.state) == "STALE(1)"


def test_a_server_that_was_started_anew_is_noticed_and_takes_weights_again(ready, models) -> None:
    ready.engine._boot_ids = ("another start",)
    with pytest.raises(EngineStateError, match="was started anew .* a weight sync must follow"):
        ready.generate([0], first_sample=0)
    put_weights(ready, models[1], version=2)
    assert ready.generate([0], first_sample=0)["weight_version"].tolist() == [2, 2, 2]


def test_sleep_and_wake_keep_the_states_of_an_engine(ready, models, client) -> None:
    ready.engine.sleep(2)
    assert client.get("/is_sleeping") == {"is_sleeping": True}
    with pytest.raises(EngineStateError, match="the engine is ASLEEP"):
        ready.engine.load_weights(models[1].named_parameters())
    ready.wake_weights()
    assert ready.engine_state() == "EMPTY without KV cache"
    put_weights(ready, models[1], version=2)
    assert client.get("/is_sleeping") == {"is_sleeping": True}
    ready.wake_kv_cache()
    assert client.get("/is_sleeping") == {"is_sleeping": False}
    assert ready.engine_state() == "READY(2)"
    assert len(ready.generate([1], first_sample=0)["str_outputs"]) == 3


def test_a_server_elsewhere_is_named_by_its_url(ready, models, tmp_path) -> None:
    key = ready.engine._process.api_key
    address = {"vllm_server": ready.engine._client.url + "/"}
    other = start(models, tmp_path, **address, vllm_server_api_key=key)
    try:
        # It generates from what the server has, and gives it weights of its own.
        first, second = (module.generate([0, 3], first_sample=4) for module in (ready, other))
        assert torch.equal(first["all_tokens"], second["all_tokens"])
        assert other.engine_state() == "READY(0)"
        put_weights(other, models[1], version=5)
        assert other.generate([0], first_sample=0)["weight_version"].tolist() == [5, 5, 5]
        with pytest.raises(EngineStateError, match="was given others"):
            ready.generate([0], first_sample=0)
    finally:
        other.shutdown()
    with pytest.raises(ServerError, match="asks for another key"):
        start(models, tmp_path, **address, vllm_server_api_key="wrong")


@pytest.mark.parametrize(
    "path, status",
    [("/health", 200), ("/v1/models", 401), ("/collective_rpc", 401), ("/sleep", 401)],
)
def test_strangers_control_nothing(engine, path, status) -> None:
    parts = urlsplit(engine._client.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    method = "GET" if path in ("/health", "/v1/models") else "POST"
    connection.request(method, path, json.dumps({"method": "chatlearn_describe"}))
    assert connection.getresponse().status == status
    connection.close()


def test_a_wrong_key_is_told_without_showing_one(engine) -> None:
    client = ServerClient(engine._client.url, api_key="wrong-key", timeout_s=9, max_retries=0)
    with pytest.raises(ServerError, match="asks for another key .*vllm_server_api_key") as refusal:
        client.get("/v1/models")
    client.close()
    assert "wrong-key" not in str(refusal.value)
    assert engine._process.api_key not in engine._process.log.read_text()


def test_a_server_is_checked_before_it_is_used(ready, engine, client) -> None:
    shape = engine._shape
    tokenize = ready.tokenizer.tokenizer.encode
    facts = inspect_server(client, shape, SEQ_LENGTH, tokenize)
    assert facts == engine._facts
    with pytest.raises(ServerError, match="at most 96 tokens, seq_length is 97; .*--max-model-len"):
        inspect_server(client, shape, SEQ_LENGTH + 1, tokenize)
    with pytest.raises(ServerError, match="with another tokenizer than the job's"):
        inspect_server(client, shape, SEQ_LENGTH, lambda text: [7, *tokenize(text)])
    with pytest.raises(ServerError, match="a model of 100 tokens, that of `load` has 101"):
        inspect_server(client, dataclasses.replace(shape, vocab_size=101), SEQ_LENGTH, tokenize)
    # What a server without our worker extension is asked.
    _probe_logprobs(client, facts.model, shape.vocab_size)
    with pytest.raises(ServerError, match="token 100, the last of the vocabulary of `load`"):
        _probe_logprobs(client, facts.model, 101)


_shared: Policy | None = None
"""On a rank of a replica with several: its module."""


def start_shared(model_dir, directory, **parallel):
    """On a rank: start a server on the devices of both; the pid of its watch on the first one."""
    global _shared
    directory = directory / os.environ["RANK"]
    directory.mkdir()
    job = job_of(model_dir, directory, num_gpu=2, vllm_server="start", **parallel)
    _shared = with_prompts(build_policy(Policy, job))
    assert _shared.engine_state() == "DUMMY"
    return _shared.engine._process.pid if _shared.rank == 0 else None


def update_shared(model_dir, version):
    """On a rank: sync weights as a trainer would; the bytes that came to this rank."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    num_bytes = put_weights(_shared, model, version, num_ranks=2)
    assert _shared.engine_state() == f"READY({version})"
    return num_bytes


def sleep_shared():
    """On a rank: sleep and wake, after which weights must come."""
    _shared.sleep()
    _shared.wake_weights()
    _shared.wake_kv_cache()
    return _shared.engine_state()


def generate_shared(is_eval):
    """On a rank: answer all prompts."""
    return _shared.generate(list(range(len(PROMPTS))), first_sample=9, is_eval=is_eval)


def end_shared():
    """On a rank: end the server as a job does."""
    _shared.shutdown()


@pytest.mark.parametrize("size", ["tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_two_ranks_share_a_server_on_the_devices_of_both(
    in_process, models, tmp_path, size
) -> None:
    ranks = Ranks(2)
    try:
        parallel = {f"{size}_model_parallel_size": 2}
        pid, _ = ranks.run(start_shared, models[0].directory, tmp_path, **parallel)
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        maps = [memory.path for process in processes for memory in process.memory_maps()]
        shared = {path for path in maps if "cpushm" in path}
        for version, model in enumerate(models, start=1):
            put_weights(in_process, model, version)
            first, others = ranks.run(update_shared, model.directory, version)
            assert first > 0 == others
            for is_eval in (False, True):
                ours, nothing = ranks.run(generate_shared, is_eval)
                indices = list(range(len(PROMPTS)))
                theirs = in_process.generate(indices, first_sample=9, is_eval=is_eval)
                assert nothing is None
                assert torch.equal(ours["all_tokens"], theirs["all_tokens"])
                assert ours["weight_version"].tolist() == [version] * (5 if is_eval else 15)
                torch.testing.assert_close(
                    ours["logprobs"], theirs["logprobs"], atol=1e-5, rtol=1e-5
                )
            assert set(ranks.run(sleep_shared)) == {"EMPTY"}
        ranks.run(end_shared)
    finally:
        ranks.close()
    assert not [process for process in processes if process.is_running()]
    assert shared
    assert not [path for path in shared if Path(path).exists()]


def test_a_server_with_a_lower_limit_of_its_own_is_told() -> None:
    def answered(finish_reason):
        choice = {"index": 0, "text": "", "token_ids": [7] * 5, "finish_reason": finish_reason}
        return _output("r", _Request(None, [5], {"max_tokens": limit}), {"choices": [choice]})

    limit = 6
    message = "request r: .* after 5 tokens, max_tokens=6 .* override_generation_config"
    with pytest.raises(ServerError, match=message):
        answered("length")
    assert answered("stop").outputs[0].token_ids == [7] * 5
    limit = 5
    assert answered("length").outputs[0].finish_reason == "length"


def test_an_address_without_server_is_told_with_what_to_do() -> None:
    client = ServerClient("http://127.0.0.1:9", api_key=None, timeout_s=9, max_retries=0)
    with pytest.raises(ServerError, match="no vLLM server answers there.*chatlearn-vllm serve DIR"):
        inspect_server(client, None, SEQ_LENGTH, list)
    client.close()
