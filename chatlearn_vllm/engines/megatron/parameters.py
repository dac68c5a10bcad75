"""What is this rank's part of the model called, and where does it lie in the whole?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from chatlearn_vllm.engines.megatron import lora, parallel
from chatlearn_vllm.engines.megatron.hf_checkpoint import LaidOut
from chatlearn_vllm.engines.megatron.model import is_expert, named_parameters
from chatlearn_vllm.layouts import (
    LowRank,
    MegatronShards,
    ModelShape,
    ParamLayout,
    TrainParallel,
    check_live_parameters,
)
from chatlearn_vllm.weight_sync.lora import merged

if TYPE_CHECKING:
    from chatlearn_vllm.config import ModelArgs


class LocalParameters:
    """The live parameters and adapters of one rank. Nothing here is collective."""

    def __init__(
        self,
        chunks: list[GPTModel],
        config: TransformerConfig,
        shape: ModelShape,
        args: ModelArgs,
    ) -> None:
        """Args:
        chunks: this rank's part of the model; adapters may be added to it later.
        config: what it was built with, parallel sizes included.
        shape: sizes of the whole model.
        args: rank, alpha and layers of the adapters.
        """
        self._chunks = chunks
        self._config = config
        self._shape = shape
        self._args = args

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters, layers numbered over the whole model.

        Adapters are not among them: see `adapters`.
        """
        return (item for item in named_parameters(self._chunks) if not lora.is_adapter(item[0]))

    def adapters(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The adapters by the name of the weight they are added to.

        Returns:
            (A [r, in], B [out, r]), live; the weight that counts is that of `named` plus
            `lora_scale` * B @ A. Empty without adapters.
        """
        return {
            f"{name}.weight": layer.low_rank() for name, layer in lora.adapted_layers(self._chunks)
        }

    @property
    def lora_scale(self) -> float:
        """Factor on B @ A of every adapter; 0 without lora_r."""
        return self._args.lora_alpha / self._args.lora_r if self._args.lora_r else 0.0

    def with_adapters(self) -> Callable[[LaidOut], torch.Tensor]:
        """A function from a weight to the one that counts: a merged copy where an adapter is."""
        adapters, scale = self.adapters(), self.lora_scale

        def value_of(weight: LaidOut) -> torch.Tensor:
            adapter = adapters.get(weight.layout.name)
            return weight.data if adapter is None else merged(weight.data, *adapter, scale)

        return value_of

    def shards(self) -> MegatronShards:
        """Where the whole model lies on the replica's ranks.

        Raises:
            ValueError: megatron-core has given this rank another place than the layouts assume.
        """
        config = self._config
        sizes = TrainParallel(
            world_size=dist.get_world_size(),
            tensor=config.tensor_model_parallel_size,
            pipeline=config.pipeline_model_parallel_size,
            virtual_pipeline=config.virtual_pipeline_model_parallel_size or 1,
            expert=config.expert_model_parallel_size,
            expert_tensor=config.expert_tensor_parallel_size,
            first_stage_layers=config.num_layers_in_first_pipeline_stage,
            last_stage_layers=config.num_layers_in_last_pipeline_stage,
        )
        here, assumed = parallel.coordinates(), sizes.coordinates(dist.get_rank())
        if here != assumed:
            raise ValueError(f"rank {dist.get_rank()} is {here}, the layouts assume {assumed}")
        of_vocabulary = {"embedding.word_embeddings.weight"}
        if self._shape.head == "lm":
            of_vocabulary.add("output_layer.weight")
        rows = [
            len(parameter) * sizes.tensor
            for name, parameter in self.named()
            if name in of_vocabulary
        ]
        low_rank = None
        if self.adapters():
            modules = frozenset(self._args.target_modules)
            low_rank = LowRank(self._args.lora_r, self.lora_scale, modules)
        return MegatronShards(self._shape, sizes, rows[0] if rows else None, low_rank)

    def laid_out(self) -> list[LaidOut]:
        """The parameters with their layouts.

        Raises:
            ValueError: the model is not the one that config.json describes; lists what differs.
        """
        layouts = self.shards().rank_layouts(dist.get_rank())
        self.check_layouts(layouts)
        live = dict(self.named())
        return [LaidOut(layout, live[layout.name].data) for layout in layouts]

    def laid_out_once(self) -> list[LaidOut]:
        """Those of `laid_out` that no other data parallel copy of the model writes."""
        return [one for one in self.laid_out() if _is_first_copy(one.layout.name)]

    def check_layouts(self, layouts: list[ParamLayout]) -> None:
        """Compare what this rank should hold with its parameters.

        Raises:
            ValueError: the model is not the one that config.json describes; lists what differs.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named()}
        check_live_parameters(layouts, shapes, "megatron-core")


def _is_first_copy(name: str) -> bool:
    """Whether this rank belongs to the data parallel copy that writes a parameter."""
    if is_expert(name):
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank() == 0
