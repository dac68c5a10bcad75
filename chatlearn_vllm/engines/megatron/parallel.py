"""Which ranks work together: megatron-core's parallel groups, and their seeds."""

import random

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from chatlearn_vllm.layouts.parallel import TrainRank


def initialize_model_parallel(
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    virtual_pipeline_model_parallel_size: int | None,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    timeout_minutes: int,
) -> None:
    """Cut the default process group into tensor, pipeline, data and expert parallel groups.

    Experts have groups of their own: tensor parallel of `expert_tensor_parallel_size` (None: as
    all other layers) times expert parallel times data parallel over the same pipeline stages.
    Groups do not inherit the default group's timeout; megatron-core's own is 30 minutes.

    Raises:
        ValueError: the number of ranks is not a multiple of tensor x pipeline parallel size, or
            of expert tensor x expert x pipeline parallel size.
    """
    ranks, pp_size = dist.get_world_size(), pipeline_model_parallel_size
    if ranks % (tensor_model_parallel_size * pp_size):
        raise ValueError(
            f"{ranks} ranks cannot hold whole copies of the model: the number "
            f"must be a multiple of tensor_model_parallel_size={tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size={pp_size}"
        )
    expert_tensor = expert_tensor_parallel_size or tensor_model_parallel_size
    if ranks % (expert_tensor * expert_model_parallel_size * pp_size):
        raise ValueError(
            f"{ranks} ranks cannot hold whole copies of the experts: the number must be a multiple "
            f"of expert_tensor_parallel_size={expert_tensor} (default: that of all layers) x "
            f"expert_model_parallel_size={expert_model_parallel_size} x "
            f"pipeline_model_parallel_size={pp_size}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        # They serve checkpoint formats that are not written here, and cost a thread each.
        create_gloo_process_groups=False,
    )


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and megatron-core's tracker of parallel random states.

    Pipeline stages draw different numbers, data parallel ranks the same ones.
    """
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def device() -> torch.device:
    """Where this rank's tensors live."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def coordinates() -> TrainRank:
    """Where this rank stands in the parallel groups."""
    return TrainRank(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_rank(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_rank(),
    )


def is_on_last_stage() -> bool:
    """Whether this rank holds the output layer."""
    return parallel_state.is_pipeline_last_stage()


def broadcast_from_last_stage(value: object) -> object:
    """Give every pipeline stage what the last stage passed; others may pass anything.

    Collective over the pipeline parallel group.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return value
    box = [value]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast_object_list(box, src=last, group=group, device=torch.device("cpu"))
    return box[0]
