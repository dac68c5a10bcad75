"""Which torch.distributed process group do the ranks of one replica share?"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def init_process_group(timeout_minutes: float = 30) -> None:
    """Join the replica's group from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    gloo on CPU; on GPU NCCL for CUDA tensors beside gloo for the others. Does nothing where the
    group exists.
    """
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=timeout)
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
