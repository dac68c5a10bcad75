"""How does megatron-core's GPTModel (local layer spec) store a model on each of its ranks?"""

from collections.abc import Iterator, Sequence

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
from chatlearn_vllm.layouts.families import EMBEDDING, FINAL_NORM, SCORE, Cut, LayerParam
from chatlearn_vllm.layouts.model import ModelShape, layer_tensor
from chatlearn_vllm.layouts.parallel import TrainParallel
from chatlearn_vllm.layouts.shards import (
    CutShards,
    Holder,
    LowRank,
    group_holders,
    join_holders,
)


class MegatronShards(CutShards):
    """A model on megatron-core's training ranks.

    Parameter names are those of the bare GPTModel with layers counted over the whole model
    (`decoder.layers.<global>.…`); experts keep their local numbers.
    """

    def __init__(
        self,
        model: ModelShape,
        parallel: TrainParallel,
        padded_vocab_size: int | None = None,
        low_rank: LowRank | None = None,
    ) -> None:
        """Describe the ranks.

        Args:
            model: sizes of the whole model.
            parallel: sizes of the parallel groups.
            padded_vocab_size: rows of the embedding over all tensor parallel ranks; None for the
                smallest multiple of the tensor parallel size.
            low_rank: the adapters that are trained, if any.

        Raises:
            ValueError: the model cannot be cut so.
        """
        super().__init__(model)
        self.parallel, self.low_rank = parallel, low_rank
        tp = parallel.tensor
        self.padded_vocab_size = padded_vocab_size or -(-model.vocab_size // tp) * tp
        _check_divisible(model, parallel)
        self._chunks = parallel.chunks(model.num_layers)
        self._stage_of = {
            layer: stage
            for stage, chunks in enumerate(self._chunks)
            for chunk in chunks
            for layer in chunk
        }

    @property
    def num_ranks(self) -> int:
        """See ShardedModel."""
        return self.parallel.world_size

    def rank_layouts(self, rank: int) -> list[ParamLayout]:
        """See ShardedModel."""
        at = self.parallel.coordinates(rank)
        layouts = []
        if at.pipeline == 0:
            layouts.append(self._vocab("embedding.word_embeddings.weight", EMBEDDING, at.tensor))
        for layer in (n for chunk in self._chunks[at.pipeline] for n in chunk):
            layouts += self._layer(layer, at.tensor)
            layouts += self._experts(layer, at.expert, at.expert_tensor)
        if at.pipeline == self.parallel.pipeline - 1:
            layouts += self._head(at.tensor)
        return layouts

    def _outer_holders(self) -> dict[str, list[Holder]]:
        last = self.parallel.pipeline - 1
        shards = []
        for tp_rank in range(self.parallel.tensor):
            embedding = self._vocab("embedding.word_embeddings.weight", EMBEDDING, tp_rank)
            shards.append((self.parallel.dense_ranks(0, tp_rank), embedding))
            ranks = self.parallel.dense_ranks(last, tp_rank)
            shards += [(ranks, layout) for layout in self._head(tp_rank)]
        return group_holders(shards)

    def _expert_holders(self, layer: int, expert: int) -> dict[str, list[Holder]]:
        stage = self._stage_of[layer]
        ep_rank = expert // (self.model.num_experts // self.parallel.expert)
        return join_holders(
            (self.parallel.expert_ranks(stage, ep_rank, etp_rank), name, block)
            for etp_rank in range(self.parallel.etp)
            for name, blocks in self._expert_blocks(layer, expert, etp_rank)
            for block in blocks
        )

    # ---- parameters ---------------------------------------------------------------------------

    def _vocab(self, name: str, tensor: str, tp_rank: int) -> ParamLayout:
        shape = (self.padded_vocab_size // self.parallel.tensor, self.model.hidden_size)
        return vocab_shard(name, tensor, self.model.vocab_size, shape, tp_rank)

    def _head(self, tp_rank: int) -> Iterator[ParamLayout]:
        yield replicated("decoder.final_layernorm.weight", FINAL_NORM, (self.model.hidden_size,))
        if self.model.head == "scalar":
            yield replicated("output_layer.weight", SCORE, self.model.tensor_shape(SCORE))
            return
        # Tied on one stage, the output layer is the embedding; on two, the last has its own copy.
        if not self.model.tie_word_embeddings or self.parallel.pipeline > 1:
            yield self._vocab("output_layer.weight", self.model.output_tensor, tp_rank)

    def _layer_param(self, layer: int, param: LayerParam, tp_rank: int) -> ParamLayout:
        name = f"decoder.layers.{layer}.{param.megatron}"
        tensors = [layer_tensor(layer, tensor) for tensor in param.tensors]
        shapes = [self.model.tensor_shape(tensor) for tensor in tensors]
        tp_size = self.parallel.tensor
        if param.cut is Cut.NONE:
            return replicated(name, tensors[0], shapes[0])
        if param.cut is Cut.COLUMNS:
            return _columns(name, tensors[0], shapes[0], tp_rank, tp_size)
        if param.cut is Cut.GATE_UP:
            return _gate_up(name, tensors, shapes[0], tp_rank, tp_size)
        columns = tuple((0, size) for size in shapes[0][1:])
        groups = [(tensor, (rows, *columns)) for tensor, rows in self._query_groups(tensors)]
        # More tensor parallel ranks than query groups cut inside a group: still plain row ranges.
        window = shard_range(sum(shape[0] for shape in shapes), tp_rank, tp_size)
        blocks = stack(groups, window)
        return ParamLayout(name, (window[1] - window[0], *shapes[0][1:]), blocks)

    def _query_groups(self, tensors: Sequence[str]) -> Iterator[tuple[str, Range]]:
        """Row order of linear_qkv: for each query group its query heads, its key, its value."""
        query, key, value = tensors
        head, groups = self.model.head_dim, self.model.num_query_groups
        per_group = self.model.num_attention_heads // groups * head
        for group in range(groups):
            yield query, (group * per_group, (group + 1) * per_group)
            yield key, (group * head, (group + 1) * head)
            yield value, (group * head, (group + 1) * head)

    def _experts(self, layer: int, ep_rank: int, etp_rank: int) -> Iterator[ParamLayout]:
        if self.model.experts_of(layer) is None:
            return
        hidden = self.model.hidden_size
        ffn = self.model.moe_ffn_hidden_size // self.parallel.etp
        shapes = ((2 * ffn, hidden), (hidden, ffn))
        for expert in range(*shard_range(self.model.num_experts, ep_rank, self.parallel.expert)):
            params = self._expert_blocks(layer, expert, etp_rank)
            for (name, blocks), shape in zip(params, shapes, strict=True):
                yield ParamLayout(name, shape, blocks)

    def _expert_blocks(
        self, layer: int, expert: int, etp_rank: int
    ) -> tuple[tuple[str, tuple[Block, ...]], tuple[str, tuple[Block, ...]]]:
        """Name and blocks of an expert's linear_fc1 and linear_fc2 on the ranks that hold it."""
        names, etp = self.model.experts_of(layer), self.parallel.etp
        local = expert % (self.model.num_experts // self.parallel.expert)
        prefix = f"decoder.layers.{layer}.mlp.experts.local_experts.{local}."
        gate, up, down = (
            layer_tensor(layer, name.format(expert=expert))
            for name in (names.gate, names.up, names.down)
        )
        columns = (0, self.model.hidden_size)
        ffn = shard_range(self.model.moe_ffn_hidden_size, etp_rank, etp)
        size = ffn[1] - ffn[0]
        fc1 = (
            Block(gate, (ffn, columns), ((0, size), columns)),
            Block(up, (ffn, columns), ((size, 2 * size), columns)),
        )
        fc2 = (Block(down, (columns, ffn), (columns, (0, size))),)
        return (prefix + "linear_fc1.weight", fc1), (prefix + "linear_fc2.weight", fc2)


def _columns(
    name: str, tensor: str, shape: tuple[int, ...], tp_rank: int, tp_size: int
) -> ParamLayout:
    """Input columns of a row parallel linear layer."""
    rows, columns = shape
    logical: Rect = ((0, rows), shard_range(columns, tp_rank, tp_size))
    local = (rows, columns // tp_size)
    return ParamLayout(name, local, (Block(tensor, logical, whole(local)),))


def _gate_up(
    name: str, tensors: Sequence[str], shape: tuple[int, ...], tp_rank: int, tp_size: int
) -> ParamLayout:
    """Each rank stacks its gate shard on its up shard, not a shard of the stacked pair."""
    rows = shard_range(shape[0], tp_rank, tp_size)
    blocks = stack([(tensor, (rows, (0, shape[1]))) for tensor in tensors])
    return ParamLayout(name, (2 * (rows[1] - rows[0]), shape[1]), blocks)


def _check_divisible(model: ModelShape, parallel: TrainParallel) -> None:
    """Raise ValueError where megatron-core could not cut the model."""
    tp = f"tensor parallel size {parallel.tensor}"
    rules = [("attention heads", model.num_attention_heads, parallel.tensor, tp)]
    if model.has_dense_layers:
        rules.append(("ffn_hidden_size", model.ffn_hidden_size, parallel.tensor, tp))
    if model.num_experts:
        etp = f"expert tensor parallel size {parallel.etp}"
        rules += [
            ("experts", model.num_experts, parallel.expert, f"expert parallel {parallel.expert}"),
            ("moe_ffn_hidden_size", model.moe_ffn_hidden_size, parallel.etp, etp),
        ]
    elif parallel.expert > 1:
        raise ValueError(f"expert parallel size {parallel.expert}: the model has no experts")
    for what, size, parts, why in rules:
        if size % parts:
            raise ValueError(f"training: {what} {size} cannot be cut by {why}")
    if model.num_query_groups % parallel.tensor and parallel.tensor % model.num_query_groups:
        raise ValueError(
            f"training: {model.num_query_groups} key/value heads cannot be cut by {tp}"
        )
