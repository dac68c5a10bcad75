"""Which torch.distributed process group do the ranks of one replica share?"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join_process_group(timeout_minutes: float = 30.0) -> None:
    """Join the replica's default process group, described by RANK, WORLD_SIZE, MASTER_ADDR, ...

    Without RANK in the environment this process is a replica of its own. On GPUs the group moves
    CPU tensors (checkpoints, metrics) over gloo and GPU tensors over NCCL. Does nothing where the
    process has a default group already.
    """
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
