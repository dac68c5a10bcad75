"""Do weights reach a server's model, whatever its kind and however many workers share it?

Real servers are compared with Hugging Face's greedy answers in float32.
"""

import json
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file

from chatlearn_vllm.engines.server_client import ServerClient
from chatlearn_vllm.engines.server_engine import ServerEngine
from chatlearn_vllm.engines.server_process import ServerStartError, start_server
from chatlearn_vllm.engines.server_start import inspect_server
from chatlearn_vllm.layouts import ModelShape
from tests.helpers import rollout_ranks
from tests.helpers.tiny_llama import save_tiny_llama
from tests.helpers.tiny_moe import save_tiny_moe

pytestmark = pytest.mark.slow

SERVER = {
    "dtype": "float32", "max_model_len": 96, "max_num_seqs": 8, "block_size": 32,
    "enforce_eager": True, "load_format": "dummy", "logprobs_mode": "processed_logprobs",
    "kv_cache_memory_bytes": 2**26,
}  # fmt: skip


class Owner:
    """Runs every batch."""

    def on_step(self, step):
        return step.execute()


def save(directory: Path, kind: str, seed: int) -> Path:
    if kind == "mixtral":
        return save_tiny_moe(directory, kind, seed=seed)
    directory.mkdir()
    save_tiny_llama(directory, tied=kind == "tied", seed=seed)
    return directory


@pytest.mark.parametrize("kind, tp", [("tied", 1), ("mixtral", 1), ("tied", 2)])
def test_a_server_answers_from_the_checkpoint_loaded_last(tmp_path, kind, tp) -> None:
    first, second = (save(tmp_path / str(seed), kind, seed) for seed in (0, 1))
    shape = ModelShape.from_hf_config(json.loads((first / "config.json").read_text()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(first)
    process = start_server(
        str(first), SERVER | {"tensor_parallel_size": tp}, tmp_path / "server.log", timeout_s=200,
        # Else vLLM wants a NUMA node for each worker.
        environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )  # fmt: skip
    client = ServerClient(
        process.url, api_key=process.api_key, timeout_s=100, max_retries=2, max_responses=8
    )
    children = psutil.Process(process.pid).children(recursive=True)
    left = {
        memory.path for one in children for memory in one.memory_maps() if "cpushm" in memory.path
    }
    try:
        facts = inspect_server(client, shape, 96, tokenizer.encode)
        assert len(facts.boot_ids) == tp
        engine = ServerEngine(
            client, facts, shape, Owner(), dtype=torch.float32, timeout_s=60, process=process,
            has_weights=False,
        )  # fmt: skip
        for version, checkpoint in enumerate((first, second, first), start=1):
            tensors = sorted(load_file(checkpoint / "model.safetensors").items())
            if version == 2:
                with pytest.raises(ValueError, match="1 tensors did not come"):
                    engine.load_weights(tensors[:-1])
            engine.load_weights(tensors)
            engine.finish_weight_update(version)
            rollout_ranks.assert_same_answers(
                answers(engine), rollout_ranks.hugging_face_answers(checkpoint)
            )
    finally:
        client.close()
        process.stop()
        for path in left:  # vLLM's CPU communicator does not remove it
            Path(path).unlink(missing_ok=True)
    assert not process.is_running


def answers(engine: ServerEngine) -> list[tuple[list[int], list[float]]]:
    sampling = {"temperature": 0.0, "max_tokens": rollout_ranks.NUM_TOKENS, "ignore_eos": True}
    for row, ids in enumerate(rollout_ranks.PROMPTS):
        engine.add_request(str(row), None, ids, sampling | {"logprobs": 0})
    completions = [output.outputs[0] for output in engine.run()]
    return [
        (
            completion.token_ids,
            [place[token].logprob for token, place in zip(*pair, strict=True)],
        )
        for completion in completions
        for pair in [(completion.token_ids, completion.logprobs)]
    ]


def test_a_server_that_does_not_start_is_told_with_the_cause(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(ServerStartError, match="(?s)ended while starting; from .*no such type"):
        start_server(str(tmp_path), {}, tmp_path / "log" / "server.log", timeout_s=200)
