"""How does vLLM store a Llama-like model on each rank of its replicas?"""

import math
from collections.abc import Iterator

from chatlearn_vllm.layouts.blocks import (
    Block,
    ParamLayout,
    Range,
    Rect,
    replicated,
    shard_range,
    stack,
    vocab_shard,
    whole,
)
from chatlearn_vllm.layouts.families import EMBEDDING, FINAL_NORM, OUTPUT, Cut, LayerParam
from chatlearn_vllm.layouts.model import ModelShape, layer_tensor
from chatlearn_vllm.layouts.parallel import RolloutParallel
from chatlearn_vllm.layouts.shards import (
    CutShards,
    Holder,
    LayeredShards,
    group_holders,
    join_holders,
)

VOCAB_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of it."""


class VLLMShards(CutShards):
    """A model on the ranks of vLLM replicas, under the names of `model.named_parameters()`."""

    def __init__(self, model: ModelShape, parallel: RolloutParallel) -> None:
        """Describe the ranks.

        Raises:
            ValueError: vLLM could not cut the model so.
        """
        super().__init__(model)
        self.parallel = parallel
        _check_divisible(model, parallel)
        self._stages = parallel.stages(model.num_layers)
        self._stage_of = {
            layer: stage for stage, layers in enumerate(self._stages) for layer in layers
        }

    @property
    def num_ranks(self) -> int:
        """See ShardedModel."""
        return self.parallel.world_size

    def rank_layouts(self, rank: int) -> list[ParamLayout]:
        """See ShardedModel."""
        at = self.parallel.coordinates(rank)
        layouts = list(self._ends(at.pipeline, at.tensor))
        for layer in self._stages[at.pipeline]:
            layouts += self._layer(layer, at.tensor)
            if self.model.experts_of(layer):
                layouts += self._experts(layer, at.tensor)
        return layouts

    def _outer_holders(self) -> dict[str, list[Holder]]:
        return group_holders(
            (self.parallel.dense_ranks(stage, tp_rank), layout)
            for stage in range(self.parallel.pipeline)
            for tp_rank in range(self.parallel.tensor)
            for layout in self._ends(stage, tp_rank)
        )

    def _expert_holders(self, layer: int, expert: int) -> dict[str, list[Holder]]:
        stage, names = self._stage_of[layer], self.model.experts_of(layer)
        parts = []
        for tp_rank in range(self.parallel.tensor):
            local_experts, _ = self._expert_share(tp_rank)
            if not local_experts[0] <= expert < local_experts[1]:
                continue
            ranks = self.parallel.dense_ranks(stage, tp_rank)
            w13, w2 = self._expert_blocks(layer, expert, tp_rank)
            parts += [(ranks, layer_tensor(layer, names.vllm_w13), block) for block in w13]
            parts.append((ranks, layer_tensor(layer, names.vllm_w2), w2))
        return join_holders(parts)

    # ---- parameters ---------------------------------------------------------------------------

    def _vocab(self, name: str, tensor: str, tp_rank: int) -> ParamLayout:
        padded = -(-self.model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        shape = (padded // self.parallel.tensor, self.model.hidden_size)
        return vocab_shard(name, tensor, self.model.vocab_size, shape, tp_rank)

    def _ends(self, stage: int, tp_rank: int) -> Iterator[ParamLayout]:
        """Embedding, final norm and output layer, as far as a stage holds them."""
        everywhere = self.model.family.vllm_ends_on_every_stage
        is_last = everywhere or stage == self.parallel.pipeline - 1
        tied = self.model.tie_word_embeddings
        if everywhere or stage == 0 or (is_last and tied):
            yield self._vocab(EMBEDDING, EMBEDDING, tp_rank)
        if is_last:
            yield replicated(FINAL_NORM, FINAL_NORM, (self.model.hidden_size,))
            if not tied:
                yield self._vocab(OUTPUT, OUTPUT, tp_rank)

    def _layer_param(self, layer: int, param: LayerParam, tp_rank: int) -> ParamLayout:
        name = layer_tensor(layer, param.vllm)
        tensors = [layer_tensor(layer, tensor) for tensor in param.tensors]
        shapes = [self.model.tensor_shape(tensor) for tensor in tensors]
        tp_size = self.parallel.tensor
        if param.cut is Cut.NONE:
            return replicated(name, tensors[0], shapes[0])
        if param.cut is Cut.COLUMNS:
            rows, columns = shapes[0]
            logical: Rect = ((0, rows), shard_range(columns, tp_rank, tp_size))
            local = (rows, columns // tp_size)
            return ParamLayout(name, local, (Block(tensors[0], logical, whole(local)),))
        if param.cut is Cut.GATE_UP:
            windows = [shard_range(shape[0], tp_rank, tp_size) for shape in shapes]
        else:
            windows = self._qkv_rows(tp_rank)
        columns = tuple((0, size) for size in shapes[0][1:])
        blocks = stack(
            (tensor, (rows, *columns)) for tensor, rows in zip(tensors, windows, strict=True)
        )
        rows = sum(stop - start for start, stop in windows)
        return ParamLayout(name, (rows, *shapes[0][1:]), blocks)

    def _qkv_rows(self, tp_rank: int) -> list[Range]:
        """Query, key and value rows; with more ranks than key/value heads, neighbours share one."""
        head, groups, tp_size = (
            self.model.head_dim,
            self.model.num_query_groups,
            self.parallel.tensor,
        )
        first, last = shard_range(self.model.num_attention_heads, tp_rank, tp_size)
        if tp_size <= groups:
            kv_first, kv_last = shard_range(groups, tp_rank, tp_size)
        else:
            kv_first = tp_rank // (tp_size // groups)
            kv_last = kv_first + 1
        kv_rows = (kv_first * head, kv_last * head)
        return [(first * head, last * head), kv_rows, kv_rows]

    def _expert_share(self, tp_rank: int) -> tuple[Range, Range]:
        """Experts of a rank and the ffn range that it holds of each."""
        experts, ffn = self.model.num_experts, self.model.moe_ffn_hidden_size
        if not self.parallel.expert:
            return (0, experts), shard_range(ffn, tp_rank, self.parallel.tensor)
        each, more = divmod(experts, self.parallel.tensor)
        first = tp_rank * each + min(tp_rank, more)
        return (first, first + each + (tp_rank < more)), (0, ffn)

    def _expert_blocks(
        self, layer: int, expert: int, tp_rank: int
    ) -> tuple[tuple[Block, Block], Block]:
        """Blocks of one expert in w13 (gate, up) and in w2."""
        names = self.model.experts_of(layer)
        experts, ffn = self._expert_share(tp_rank)
        local, size, hidden = expert - experts[0], ffn[1] - ffn[0], self.model.hidden_size
        gate, up, down = (
            layer_tensor(layer, name.format(expert=expert))
            for name in (names.gate, names.up, names.down)
        )
        slot, columns = (local, local + 1), (0, hidden)
        return (
            (
                Block(gate, (ffn, columns), (slot, (0, size), columns)),
                Block(up, (ffn, columns), (slot, (size, 2 * size), columns)),
            ),
            Block(down, (columns, ffn), (slot, columns, (0, size))),
        )

    def _experts(self, layer: int, tp_rank: int) -> list[ParamLayout]:
        names = self.model.experts_of(layer)
        experts, ffn = self._expert_share(tp_rank)
        number, size, hidden = experts[1] - experts[0], ffn[1] - ffn[0], self.model.hidden_size
        blocks = [self._expert_blocks(layer, expert, tp_rank) for expert in range(*experts)]
        w13 = tuple(block for both, _ in blocks for block in both)
        w2 = tuple(block for _, block in blocks)
        return [
            ParamLayout(layer_tensor(layer, names.vllm_w13), (number, 2 * size, hidden), w13),
            ParamLayout(layer_tensor(layer, names.vllm_w2), (number, hidden, size), w2),
        ]


class CheckpointShards(LayeredShards):
    """Ranks take every tensor of the checkpoint whole, as vLLM's own loader wants them."""

    def __init__(
        self, model: ModelShape, num_loaders: int, batch_elements: int, *, ranks_per_loader: int = 1
    ) -> None:
        """Describe the ranks.

        Args:
            model: sizes of the model.
            num_loaders: ranks that take the tensors, of all replicas.
            batch_elements: a batch of tensors is closed before it exceeds this.
            ranks_per_loader: with more than 1, the others that follow each of these take nothing.
        """
        super().__init__(model)
        self._num_loaders, self._ranks_per_loader = num_loaders, ranks_per_loader
        self._batch_of: dict[str, int] = {}
        batch = filled = 0
        for name in model.tensor_names():
            size = math.prod(model.tensor_shape(name))
            if filled and filled + size > batch_elements:
                batch, filled = batch + 1, 0
            self._batch_of[name] = batch
            filled += size

    @property
    def num_ranks(self) -> int:
        """See ShardedModel."""
        return self._num_loaders * self._ranks_per_loader

    def rank_layouts(self, rank: int) -> list[ParamLayout]:
        """See ShardedModel; in the order of the layers."""
        if rank % self._ranks_per_loader:
            return []
        return [
            replicated(name, name, self.model.tensor_shape(name))
            for name in self.model.tensor_names()
        ]

    @property
    def num_batches(self) -> int:
        """See ShardedModel."""
        return max(self._batch_of.values()) + 1

    def batch_of(self, param: str) -> int:
        """See ShardedModel."""
        return self._batch_of[param]

    def _outer_holders(self) -> dict[str, list[Holder]]:
        output = () if self.model.tie_word_embeddings else (OUTPUT,)
        return self._all(EMBEDDING, FINAL_NORM, *output)

    def _layer_holders(self, layer: int) -> dict[str, list[Holder]]:
        params = self.model.layer_params(layer)
        return self._all(*(layer_tensor(layer, name) for param in params for name in param.tensors))

    def _expert_holders(self, layer: int, expert: int) -> dict[str, list[Holder]]:
        names = self.model.experts_of(layer)
        own = (names.gate, names.up, names.down)
        return self._all(*(layer_tensor(layer, name.format(expert=expert)) for name in own))

    def _all(self, *tensors: str) -> dict[str, list[Holder]]:
        ranks = tuple(range(0, self.num_ranks, self._ranks_per_loader))
        return group_holders(
            (ranks, replicated(name, name, self.model.tensor_shape(name))) for name in tensors
        )


def _check_divisible(model: ModelShape, parallel: RolloutParallel) -> None:
    """Raise ValueError where vLLM could not cut the model, or could not generate with it."""
    if model.head != "lm":
        raise ValueError(f"rollout: a model with head {model.head!r} cannot generate, must be 'lm'")
    tp = parallel.tensor
    rules = [("attention heads", model.num_attention_heads)]
    if model.has_dense_layers:
        rules.append(("ffn_hidden_size", model.ffn_hidden_size))
    if model.num_experts and not parallel.expert:
        rules.append(("moe_ffn_hidden_size", model.moe_ffn_hidden_size))
    rules.append(("the padded vocabulary", -(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE))
    for what, size in rules:
        if size % tp:
            raise ValueError(
                f"rollout: {what} {size} cannot be cut by tensor parallel size {tp}; "
                "vLLM refuses it too"
            )
    if model.num_query_groups % tp and tp % model.num_query_groups:
        raise ValueError(
            f"rollout: {model.num_query_groups} key/value heads cannot be spread over tensor "
            f"parallel size {tp}; vLLM refuses it too"
        )
    if parallel.expert and not model.num_experts:
        raise ValueError("rollout: enable_expert_parallel: the model has no experts")
    if parallel.pipeline > model.num_layers:
        raise ValueError(
            f"rollout: {model.num_layers} layers cannot be spread over {parallel.pipeline} stages"
        )
