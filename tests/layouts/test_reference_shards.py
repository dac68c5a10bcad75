"""Are the parameters that tests assemble by hand those that vLLM's own loader makes?

vLLM builds one rank after the other in this process, each among neighbours that are not there:
building and loading communicate with nobody. No engine, no attention, so sizes may be tiny.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from chatlearn_vllm.engines import vllm_compat
from chatlearn_vllm.layouts import ModelShape, RolloutParallel
from tests.helpers.reference_shards import (
    FAMILIES,
    Tensors,
    logical_tensors,
    tiny_shape,
    vllm_tensors,
)

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


class Neighbours:
    """What building a model asks of a group of ranks."""

    def __init__(self, size: int, rank: int) -> None:
        self.world_size, self.rank_in_group, self.ranks = size, rank, list(range(size))
        self.is_first_rank, self.is_last_rank = rank == 0, rank == size - 1
        self.rank = rank
        self.device_group = self
        self.cpu_group = None

    def size(self) -> int:
        return self.world_size


def save_config(model: ModelShape, directory: Path) -> None:
    """Write the config.json of which the model has its sizes."""
    config = AutoConfig.for_model(
        model.model_type,
        architectures=[CLASSES[model.model_type]],
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        tie_word_embeddings=model.tie_word_embeddings,
        max_position_embeddings=64,
        **(
            dict(
                num_local_experts=model.num_experts,
                num_experts_per_tok=2,
                moe_intermediate_size=model.moe_ffn_hidden_size,
                mlp_only_layers=sorted(model.dense_layers),
            )
            if model.num_experts
            else {}
        ),
    )
    config.save_pretrained(directory)


def loaded_by_vllm(
    directory: Path, parallel: RolloutParallel, rank: int, checkpoint: Tensors
) -> Tensors:
    """A rank's parameters after `load_weights` of a whole checkpoint; zero where it left them."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(
        model=str(directory), dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
        tensor_parallel_size=parallel.tensor, pipeline_parallel_size=parallel.pipeline,
        enable_expert_parallel=parallel.expert, distributed_executor_backend="external_launcher",
    ).create_engine_config()  # fmt: skip
    stage, tp_rank = divmod(rank, parallel.tensor)
    groups = {
        "_TP": Neighbours(parallel.tensor, tp_rank),
        "_EP": Neighbours(parallel.tensor, tp_rank),
        "_PP": Neighbours(parallel.pipeline, stage),
        **dict.fromkeys(("_DP", "_PCP", "_DCP"), Neighbours(1, 0)),
    }
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM does so, and leaves it
        for name, group in groups.items():
            patch.setattr(parallel_state, name, group)
        with set_current_vllm_config(config), vllm_compat.unpacked_cpu_weights():
            model = initialize_model(config)
            for parameter in model.parameters():
                parameter.zero_()
            model.load_weights((name, tensor.float()) for name, tensor in checkpoint.items())
    return {name: parameter.detach().long() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True, "vocab": 125, "groups": 1}],
    ids=["", "tied, odd vocabulary, one key/value head"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_all_ranks_are_those_of_vllms_loader(tmp_path, family, changes) -> None:
    model = tiny_shape(family, **changes)
    if family == "qwen2":  # vLLM gives it no other head_dim
        model = dataclasses.replace(model, head_dim=2)
    if model.num_experts:  # vLLM's kernels on CPU want a multiple of 32
        model = dataclasses.replace(model, hidden_size=32)
    if family == "mixtral":  # which has one width
        model = dataclasses.replace(model, ffn_hidden_size=12)
    save_config(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ModelShape.from_hf_config(config) == model
    checkpoint = logical_tensors(model)
    kinds = (False, True) if model.num_experts else (False,)
    for tp, pp, expert in itertools.product((1, 2, 4), (1, 2, 3), kinds):
        parallel = RolloutParallel(tp, pp, expert)
        for rank in range(parallel.world_size):
            found = loaded_by_vllm(tmp_path, parallel, rank, checkpoint)
            expected = vllm_tensors(model, checkpoint, parallel, rank)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), (parallel, rank, name)
