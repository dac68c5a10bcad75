"""One real vLLM policy in the test process, and weights put into it as a sync does."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
import yaml

from chatlearn_vllm.config import JobConfig, load_config
from chatlearn_vllm.layouts import Block, ParamLayout
from chatlearn_vllm.layouts.blocks import whole
from chatlearn_vllm.modules.vllm_module import VLLMModule
from chatlearn_vllm.weight_sync.transport import export_tensors, run_plan

SEQ_LENGTH = 96


def policy_job(
    directory: Path, model_dir: Path, *, num_gpu: int = 1, **model_args: Any
) -> JobConfig:
    """A job with `num_gpu` rollout ranks; `model_args` are added to its model file."""
    settings = {
        "load": str(model_dir), "seq_length": SEQ_LENGTH, "max_new_tokens": 12, "seed": 7,
        "max_num_seqs": 8,
    }  # fmt: skip
    (directory / "policy.yaml").write_text(yaml.safe_dump(settings | model_args))
    policy = {"num_gpu": num_gpu, "model_config_file": "policy.yaml"}
    job = {"models": {"policy": policy}, "runtime": {"sample_per_episode": 12}}
    (directory / "job.yaml").write_text(yaml.safe_dump(job))
    return load_config(directory / "job.yaml")


def start_policy(cls: type[VLLMModule], job: JobConfig) -> VLLMModule:
    """Build the module's engine in this process, as the only rank of its replica."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    module = cls("policy", job)
    module.init()
    module.model_setup()
    return module


def put_weights(module: VLLMModule, model: torch.nn.Module, version: int) -> int:
    """Sync a Hugging Face model's weights into the engine; returns the bytes written."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    sources = [
        ParamLayout(n, tuple(t.shape), (Block(n, whole(tuple(t.shape)), whole(tuple(t.shape))),))
        for n, t in tensors.items()
    ]
    module.plan_weight_sync({0: sources}, [])
    if not next(model.parameters()).is_cuda:
        return module.import_weights(version, export_tensors(tensors))
    # CUDA opens no handle in the process that made it, so leave the handles out.
    targets = module.engine.begin_weight_update()
    num_bytes = run_plan(module._plan, {0: tensors}, targets)
    module.engine.finish_weight_update(version)
    return num_bytes
