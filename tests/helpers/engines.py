"""One real vLLM policy in the test process, and weights put into it as a sync does."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
import yaml

from chatlearn_vllm.config import JobConfig, load_config
from chatlearn_vllm.layouts import ListedShards
from chatlearn_vllm.layouts.blocks import replicated
from chatlearn_vllm.modules.vllm_module import VLLMModule
from chatlearn_vllm.weight_sync.digest import EVERYTHING
from chatlearn_vllm.weight_sync.links import colocated
from chatlearn_vllm.weight_sync.sender import WeightSender

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
    return build_policy(cls, job)


def build_policy(cls: type[VLLMModule], job: JobConfig) -> VLLMModule:
    """Build the module's engine in this process, as the rank that the environment names."""
    module = cls("policy", job)
    module.init()
    module.model_setup()
    return module


def put_weights(
    module: VLLMModule, model: torch.nn.Module, version: int, *, num_ranks: int = 1
) -> int:
    """Sync a Hugging Face model's weights into the engine; returns the bytes written.

    The tensors are shown through main memory: CUDA opens no handle in the process that made it.
    Of several ranks of a replica each calls this, with the same weights.
    """
    tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}
    layouts = [replicated(name, name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    sources, targets = ListedShards({0: layouts}), module.weight_shards(1)
    links = colocated(1, num_ranks, num_ranks)
    sender = WeightSender(0, lambda: tensors, lambda: version)
    sender.plan(sources, targets, links)
    plan = module.plan_weight_sync(module.rank, sources, targets, links)
    senders = tuple(plan.fingerprints)
    module.import_weights(senders, False, EVERYTHING, *[sender.export() for _ in senders])
    sent = sender.sent()
    arrival = module.finish_weight_sync(version, senders, *[sent for _ in senders])
    assert arrival.is_good
    return arrival.num_bytes


def change_model_args(monkeypatch: Any, module: Any, **changes: Any) -> None:
    """Give a policy that is there other values of keys, for the length of a test."""
    config = module.module_args
    args = config.model_args.model_copy(update=changes)
    models = {**module.job.models, module.name: config.model_copy(update={"model_args": args})}
    monkeypatch.setattr(module, "job", module.job.model_copy(update={"models": models}))
