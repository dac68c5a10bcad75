"""Real vLLM engines on spawned ranks: build one, change its weights, ask it for greedy answers.

The functions run on every rank of a replica (see `Ranks`); `build` keeps the engine for the others.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from tests.helpers.engines import policy_job

PROMPTS = [[5, 6, 7, 8], [20, 21], [30, 31, 32, 33, 34, 35, 36]]
NUM_TOKENS = 8

_policy: Any = None


def build(job_dir: Path, model_dir: Path, tp: int, pp: int, **model_args: Any) -> str:
    """Build the engine, with dummy weights unless `model_args` say otherwise; its state."""
    global _policy
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from chatlearn_vllm.modules.vllm_module import VLLMModule

    class Policy(VLLMModule):
        build_dataset = model_provider = _add_request = decode_internal = None

        def setup(self):
            pass

        steps_to_error = 0

        def forward_step(self, data, iteration=0):
            handle = self.execute_step(data)
            self.steps_to_error -= 1
            if self.steps_to_error == 0:
                raise ArithmeticError("wrong")
            return handle

    directory = job_dir / os.environ["RANK"]
    directory.mkdir(parents=True)
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    job = policy_job(directory, model_dir, num_gpu=tp * pp, **parallel, **model_args)
    _policy = Policy("policy", job)
    _policy.init()
    _policy.model_setup()
    return _policy.engine_state()


def policy() -> Any:
    """This rank's module."""
    return _policy


def drop() -> None:
    """End the engine and the process group, so that the rank can build another engine."""
    global _policy
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    _policy.shutdown()
    _policy = None
    gc.collect()
    destroy_model_parallel()
    destroy_distributed_environment()


def answers() -> list[tuple[list[int], list[float]]]:
    """Greedy tokens of every prompt, and the log probability of each."""
    sampling = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 0}
    for row, ids in enumerate(PROMPTS):
        _policy.engine.add_request(str(row), None, ids, sampling)
    completions = [output.outputs[0] for output in _policy.engine.run()]
    return [
        (
            list(completion.token_ids),
            [
                step[token].logprob
                for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
            ],
        )
        for completion in completions
    ]


def responses(requests: list[tuple[list[int], dict[str, Any]]]) -> list[list[tuple]]:
    """Answer requests of token ids and sampling keys.

    Returns:
        Per request and response: its tokens, their log-probabilities, its text and why it ended.
    """
    for number, (ids, sampling) in enumerate(requests):
        _policy.engine.add_request(str(number), None, ids, sampling)
    return [
        [
            (list(one.token_ids), one.logprobs.logprobs, one.text, one.finish_reason)
            for one in output.outputs
        ]
        for output in _policy.engine.run()
    ]


def cut_off(requests: list[tuple[list[int], dict[str, Any]]], num_steps: int) -> int:
    """Begin to answer requests, and drop what is left after some steps; how many were finished."""
    for number, (ids, sampling) in enumerate(requests):
        _policy.engine.add_request(str(number), None, ids, sampling)
    finished = _policy.engine.run(max_steps=num_steps)
    _policy.engine.cut()
    return len(finished)


def error_in_step(number: int, requests: list[tuple[list[int], dict[str, Any]]]) -> str:
    """Answer requests with a `forward_step` that raises in a step, from 1; what it says."""
    _policy.steps_to_error = number
    try:
        responses(requests)
    except ArithmeticError as error:
        return str(error)
    return ""


def write_checkpoint(checkpoint: Path, version: int) -> str:
    """Write a checkpoint into the live parameters, where their layouts say; the engine's state."""
    tensors = load_file(checkpoint / "model.safetensors")
    parameters = _policy.engine.begin_weight_update()
    layouts = _policy.engine.shards(1).rank_layouts(torch.distributed.get_rank())
    with torch.no_grad():
        for layout in layouts:
            for block in layout.blocks:
                local, logical = (
                    tuple(slice(*bounds) for bounds in rect)
                    for rect in (block.local, block.logical)
                )
                parameters[layout.name][local] = tensors[block.tensor][logical]
    _policy.engine.finish_weight_update(version)
    return _policy.engine_state()


def load_checkpoint(checkpoint: Path, version: int) -> str:
    """Pass a checkpoint through vLLM's loader; the engine's state."""
    tensors = load_file(checkpoint / "model.safetensors")
    _policy.engine.load_weights(sorted(tensors.items()))
    _policy.engine.finish_weight_update(version)
    return _policy.engine_state()


def sleep_and_load(checkpoint: Path, version: int) -> str:
    """Let the engine sleep, and wake it with a checkpoint; its state."""
    _policy.sleep()
    _policy.wake_weights()
    load_checkpoint(checkpoint, version)
    _policy.wake_kv_cache()
    return _policy.engine_state()


def hugging_face_answers(checkpoint: Path) -> list[tuple[list[int], list[float]]]:
    """What `answers` should be, computed by Hugging Face in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).float().eval()
    model.generation_config.eos_token_id = None
    expected = []
    for ids in PROMPTS:
        with torch.no_grad():
            made = model.generate(
                torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        tokens = made.sequences[0, len(ids) :]
        logprobs = torch.cat(made.logits).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        expected.append((tokens.tolist(), logprobs.tolist()))
    return expected


def assert_same_answers(got: list, expected: list) -> None:
    """Equal tokens, and log probabilities to 1e-5."""
    for (tokens, logprobs), (want_tokens, want_logprobs) in zip(got, expected, strict=True):
        assert tokens == want_tokens
        difference = torch.tensor(logprobs) - torch.tensor(want_logprobs)
        assert difference.abs().max() < 1e-5
