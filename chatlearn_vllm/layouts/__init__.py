"""Where each rank's parameters lie inside the model's logical tensors; pure Python.

A *logical tensor* is one tensor of the Hugging Face checkpoint, by name and full shape. A rank's
parameter (megatron-core's `linear_qkv.weight`, vLLM's `qkv_proj.weight`) is a set of rectangles of
logical tensors. One description of each side serves checkpoint loading and saving and the weight
sync, so the two cannot disagree.

    blocks.py   Block, ParamLayout and their arithmetic
    model.py    ModelShape: the sizes of a model, from its Hugging Face config.json
    megatron.py how megatron-core stores a parameter on one rank
    vllm.py     how vLLM stores a parameter on one rank
"""

from chatlearn_vllm.layouts.blocks import Block, ParamLayout
from chatlearn_vllm.layouts.megatron import megatron_param_layout
from chatlearn_vllm.layouts.model import ModelShape
from chatlearn_vllm.layouts.vllm import vllm_param_layout

__all__ = ["Block", "ModelShape", "ParamLayout", "megatron_param_layout", "vllm_param_layout"]
