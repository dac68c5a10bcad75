"""How is training state saved so that it resumes with other parallel sizes?

<directory>/iter_0000020/    megatron-core's dist_checkpointing files
            rng_00003.pt     random states of rank 3
            hf/              config.json and tokenizer, so that export.py needs nothing else
            chatlearn.json   written last: iteration, parallel sizes, formats, and all other files
<directory>/latest           name of the newest complete one
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import queue
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from chatlearn_vllm.engines.megatron import checkpoint_files
from chatlearn_vllm.engines.megatron.background_writer import BackgroundWriter
from chatlearn_vllm.engines.megatron.checkpoint_files import (
    FORMAT_VERSION,
    HF_FILES,
    LATEST,
    MARKER,
    checkpoint_name,
)
from chatlearn_vllm.engines.megatron.files import (
    begin_directory,
    commit_directory,
    read_json,
    write_text_atomically,
)
from chatlearn_vllm.engines.megatron.hf_checkpoint import write_side_files
from chatlearn_vllm.layouts import Head

if TYPE_CHECKING:
    from chatlearn_vllm.config import ModelArgs

_MAIN_PARAMETERS = "fp32_from_fp16_params"
"""megatron-core's key of an optimizer's float32 copies of bf16 or fp16 parameters."""
_YAML_KEYS = ("max_lr", "min_lr", "betas", "eps")
"""What a group of an optimizer's parameters has from the yaml, besides what the schedule sets."""
_LAYOUT_KEYS = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)

logger = logging.getLogger(__name__)


class Resumable(NamedTuple):
    """What a checkpoint holds."""

    chunks: list[GPTModel]
    optimizer: MegatronOptimizer | None
    scheduler: OptimizerParamScheduler | None
    head: Head = "lm"
    """What the model ends with."""


class HFFiles(NamedTuple):
    """What makes an exported model of weights."""

    config: Mapping[str, Any]
    """Becomes config.json."""
    directories: Sequence[Path]
    """Where the tokenizer files are."""


class UnfinishedSave:
    """A checkpoint that is being written; from `finish` on it is there."""

    def __init__(
        self,
        directory: Path,
        iteration: int,
        state: Resumable,
        args: ModelArgs,
        hf_files: HFFiles,
        *,
        in_background: bool,
    ) -> None:
        """Write everything, or what is left to write in the background. All ranks.

        Args:
            directory: where the checkpoints are.
            iteration: number of this one.
            state: what to save; may change afterwards.
            args: settings of the model.
            hf_files: what an export needs besides.
            in_background: let a thread write the tensors from copies in host memory.

        Raises:
            ValueError: psutil is not installed; megatron-core would hang instead of saying so.
            RuntimeError: on all ranks: some could not write; names each and its error.
        """
        if importlib.util.find_spec("psutil") is None:
            raise ValueError("saving a checkpoint needs the package psutil: pip install psutil")
        self._directory, self._name = directory, checkpoint_name(iteration)
        self._about = {
            **_describe(args, iteration),
            "format_version": FORMAT_VERSION,
            "head": state.head,
            "model_type": hf_files.config["model_type"],
            "load": args.load,
        }
        self._hf_files = hf_files
        self._dtype = next(state.chunks[0].parameters()).dtype
        if dist.get_rank() == 0:
            checkpoint_files.remove_unfinished(directory)
        self._temporary = begin_directory(directory / self._name)
        sharded = _sharded_state(state, self._about["optimizer_format"], is_loading=False)
        self._writer: BackgroundWriter | None = None
        with _write_results_stay_in_this_process(), _failures_told_on_all_ranks(self._temporary):
            request = dist_checkpointing.save(
                sharded,
                str(self._temporary),
                async_sharded_save=in_background,
                **_planned_by_megatron_core(),
            )
        if request is not None:
            self._writer = BackgroundWriter(request)
        torch.save(_random_state(), self._temporary / f"rng_{dist.get_rank():05d}.pt")

    @property
    def is_written(self) -> bool:
        """Whether `finish` will not have to wait for this rank. Not collective."""
        return self._writer is None or self._writer.is_done

    def finish(self) -> None:
        """Wait for all ranks' files, note down what they are, point `latest` at them. All ranks.

        Raises:
            RuntimeError: on all ranks: a rank could not write in the background.
        """
        if self._writer is not None:
            self._writer.finish()
        dist.barrier()
        if dist.get_rank() == 0:
            hf = self._temporary / HF_FILES
            hf.mkdir()
            write_side_files(hf, self._hf_files.config, self._dtype, self._hf_files.directories)
            files = checkpoint_files.describe_files(self._temporary)
            text = json.dumps({**self._about, "files": files}, indent=2) + "\n"
            (self._temporary / MARKER).write_text(text)
        commit_directory(self._directory / self._name)
        if dist.get_rank() == 0:
            write_text_atomically(self._directory / LATEST, self._name + "\n")
        dist.barrier()


@contextmanager
def _failures_told_on_all_ranks(directory: Path) -> Iterator[None]:
    """megatron-core fails on all ranks, and tells the reasons on the first one only."""
    try:
        yield
    except CheckpointException as error:
        own = [f"rank {rank}: {reason!r}" for rank, (reason, _) in sorted(error.failures.items())]
        told: list[list[str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, own)
        reasons = "\n".join(reason for of_rank in told for reason in of_rank or ())
        try:
            room = f"{shutil.disk_usage(directory).free / 2**20:.1f} MiB are free there"
        except OSError as why:  # it is gone, or not there on this rank's host
            room = f"it cannot be looked at from rank {dist.get_rank()}: {why}"
        raise RuntimeError(
            f"a checkpoint could not be written in {directory}:\n{reasons}\n{room}"
        ) from None


def load(directory: Path, iteration: int | None, state: Resumable, args: ModelArgs) -> int | None:
    """Read a checkpoint into the state. All ranks.

    The random states are restored if the ranks are arranged as when it was saved; else every rank
    keeps those of its seed.

    Returns:
        Its iteration; None if `iteration` is None and there is no checkpoint.

    Raises:
        ValueError: the asked-for checkpoint does not exist, or cannot be read with these settings.
    """
    latest = directory / LATEST
    if iteration is None and not latest.is_file():
        return None
    name = checkpoint_name(iteration) if iteration is not None else latest.read_text().strip()
    path = directory / name
    _check_files(path)
    about = read_json(path / MARKER)
    _check_head(path, about, state.head)
    _check_readable(path, about, args)
    wanted = _sharded_state(state, about["optimizer_format"], is_loading=True)
    loaded = dist_checkpointing.load(wanted, str(path))
    for key, chunk in zip(_model_keys(state), state.chunks, strict=True):
        chunk.load_state_dict(loaded[key])
    if state.optimizer is not None:
        # A resumed job follows its yaml: the saved values would win over it otherwise.
        own = [{key: group[key] for key in _YAML_KEYS} for group in state.optimizer.param_groups]
        if _has_replicated_experts(state, about["optimizer_format"]):
            _restore_empty_lists(loaded["optimizer"])
        state.optimizer.load_state_dict(loaded["optimizer"])
        for group, values in zip(state.optimizer.param_groups, own, strict=True):
            group.update(values)
        state.scheduler.num_steps = 0
        state.scheduler.load_state_dict(loaded["scheduler"])
    if not _changed_keys(about, args):
        _set_random_state(torch.load(path / f"rng_{dist.get_rank():05d}.pt", weights_only=False))
    elif dist.get_rank() == 0:
        logger.info("%s was saved with other parallel sizes: random states start anew", path)
    return about["iteration"]


def _check_files(path: Path) -> None:
    """Let rank 0 look at a checkpoint's files; raises ValueError on all ranks."""
    message: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            checkpoint_files.check(path)
        except ValueError as error:
            message = [str(error)]
    dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
    if message[0] is not None:
        raise ValueError(message[0])


def _describe(args: ModelArgs, iteration: int) -> dict[str, Any]:
    optimizer_format = "fully_reshardable" if args.use_distributed_optimizer else "replicated"
    return {
        "iteration": iteration,
        "world_size": dist.get_world_size(),
        **{key: args[key] for key in _LAYOUT_KEYS[1:]},
        "optimizer_format": optimizer_format,
        "adapters": _describe_adapters(args),
    }


def _check_head(path: Path, about: dict[str, Any], head: Head) -> None:
    """Raise ValueError where megatron-core would read a part of one head into the other."""
    saved = about.get("head", "lm")  # files of older versions have no other
    if saved != head:
        raise ValueError(
            f"{path}: holds a model with head {saved!r}, which cannot resume one with head "
            f"{head!r}; give each model a directory of its own with the key save"
        )


def _check_readable(path: Path, about: dict[str, Any], args: ModelArgs) -> None:
    mine = _describe(args, about["iteration"])
    adapters = about.get("adapters", {"lora_r": 0})  # files of older versions have none
    if adapters != mine["adapters"]:
        raise ValueError(
            f"{path}: was saved with {adapters}, set these keys so; they are {mine['adapters']}"
        )
    saved, wanted = about["optimizer_format"], mine["optimizer_format"]
    if (saved == "replicated") != (wanted == "replicated"):
        raise ValueError(
            f"{path}: was saved with use_distributed_optimizer={saved != 'replicated'}, "
            f"set it so (it is {args.use_distributed_optimizer})"
        )


def _changed_keys(about: dict[str, Any], args: ModelArgs) -> list[str]:
    """How the ranks are arranged otherwise than when a checkpoint was saved."""
    mine = _describe(args, 0)
    # Files of older versions lack keys that had one value then.
    return [key for key in _LAYOUT_KEYS if about.get(key, mine[key]) != mine[key]]


def _describe_adapters(args: ModelArgs) -> dict[str, Any]:
    if not args.lora_r:
        return {"lora_r": 0}
    targets = sorted(args.target_modules)
    return {"lora_r": args.lora_r, "lora_alpha": args.lora_alpha, "target_modules": targets}


def _model_keys(state: Resumable) -> list[str]:
    if len(state.chunks) == 1:
        return ["model"]
    return [f"model{number}" for number in range(len(state.chunks))]


def _sharded_state(state: Resumable, optimizer_format: str, *, is_loading: bool) -> dict[str, Any]:
    """What dist_checkpointing saves, or fills when loading."""
    # The format must be explicit: the default one fails ("flattened_range is not supported").
    metadata = {
        "distrib_optim_sharding_type": optimizer_format,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # The optimizer of experts is a second one; without a prefix a checkpoint can be read
        # where its tensors belong to another part.
        "chained_optim_avoid_prefix": True,
    }
    # Of the bare GPTModel: the data parallel wrapper would prefix every key.
    models = {
        key: chunk.sharded_state_dict(metadata=metadata)
        for key, chunk in zip(_model_keys(state), state.chunks, strict=True)
    }
    sharded: dict[str, Any] = dict(models)
    if state.optimizer is not None:
        sharded["optimizer"] = state.optimizer.sharded_state_dict(
            models["model"] if len(models) == 1 else models,
            is_loading=is_loading,
            metadata=metadata,
        )
        if _has_replicated_experts(state, optimizer_format):
            _make_alike_on_all_stages(sharded["optimizer"])
        sharded["scheduler"] = state.scheduler.state_dict()
    return sharded


def _has_replicated_experts(state: Resumable, optimizer_format: str) -> bool:
    return optimizer_format == "replicated" and len(state.optimizer.chained_optimizers) > 1


def _make_alike_on_all_stages(parts: dict[int, dict[str, Any]]) -> None:
    """Change the optimizer of experts so that stages with and without experts can be mixed.

    What is not a tensor is saved by rank 0 and loaded by all. If there are no experts on its
    pipeline stage, it has no step count to save, and empty lists that do not fit elsewhere.
    """
    dense, experts = (parts[number] for number in sorted(parts))
    states = [part.get("optimizer", part)["state"] for part in (dense, experts)]
    if "common_step" in states[0]:
        states[1]["common_step"] = states[0]["common_step"]  # both step together
    if not any(experts.get(_MAIN_PARAMETERS, ())):
        experts.pop(_MAIN_PARAMETERS, None)


def _restore_empty_lists(parts: dict[int, dict[str, Any]]) -> None:
    """Undo on a stage without experts what `_make_alike_on_all_stages` left out."""
    experts = parts[max(parts)]
    if "optimizer" in experts and _MAIN_PARAMETERS not in experts:
        experts[_MAIN_PARAMETERS] = [[] for _ in experts["optimizer"]["param_groups"]]


def _planned_by_megatron_core() -> dict[str, str]:
    """Arguments of `dist_checkpointing.save` with which it needs no further package.

    From 0.17 on it would leave saves in the background to nvidia-resiliency-ext.
    """
    is_choice = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if is_choice else {}


@contextmanager
def _write_results_stay_in_this_process() -> Iterator[None]:
    """Within the block megatron-core collects the results of its writers in a plain queue.

    For saves in the background it would start a process to hold that queue: seconds per save,
    hundreds of MiB per rank, and it outlives a rank that is killed. What is written in the
    background here, a thread writes. The queue is a variable of megatron-core's module, which is
    put back.
    """
    original = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = original


def _random_state() -> dict[str, Any]:
    is_cuda = torch.cuda.is_available()
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if is_cuda else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
