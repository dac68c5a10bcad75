"""Where each rank's parameters lie inside the model's logical tensors; pure Python.

A *logical tensor* is one tensor of the Hugging Face checkpoint, by name and full shape. A rank's
parameter (megatron-core's `linear_qkv.weight`, vLLM's `qkv_proj.weight`) is a set of rectangles of
logical tensors. One description of each side serves checkpoint loading and saving and the weight
sync, so the two cannot disagree.

    blocks.py   Block, ParamLayout and their arithmetic
    families.py one line per parameter of a model family: its name on each side, how it is cut
    model.py    ModelShape: the sizes of a model, its logical tensors and their shapes
    hf_config.py which sizes a Hugging Face config.json gives
    parallel.py coordinates of ranks, layers of pipeline stages, on either side
    shards.py   ShardedModel: the parameters of each rank, the holders of each tensor
    megatron.py how megatron-core stores a model
    vllm.py     how vLLM stores a model
"""

from chatlearn_vllm.layouts.blocks import Block, ParamLayout
from chatlearn_vllm.layouts.families import SCORE, Head
from chatlearn_vllm.layouts.megatron import MegatronShards
from chatlearn_vllm.layouts.model import ModelShape
from chatlearn_vllm.layouts.parallel import RolloutParallel, TrainParallel
from chatlearn_vllm.layouts.shards import (
    Holder,
    ListedShards,
    LowRank,
    ReplicatedShards,
    ShardedModel,
    check_live_parameters,
)
from chatlearn_vllm.layouts.vllm import CheckpointShards, VLLMShards

__all__ = [
    "SCORE",
    "Block",
    "CheckpointShards",
    "Head",
    "Holder",
    "ListedShards",
    "LowRank",
    "MegatronShards",
    "ModelShape",
    "ParamLayout",
    "ReplicatedShards",
    "RolloutParallel",
    "ShardedModel",
    "TrainParallel",
    "VLLMShards",
    "check_live_parameters",
]
