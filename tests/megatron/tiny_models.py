"""Tiny checkpoints of each supported family, and runs of the engine on them; used on the ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chatlearn_vllm.config import ModelArgs
from chatlearn_vllm.engines.megatron import optimizer
from chatlearn_vllm.engines.megatron.engine import MegatronEngine
from chatlearn_vllm.engines.megatron.micro_batches import equal_groups, take

VOCAB_SIZE = 99  # odd: padded for tensor parallel 2
SEQ_LENGTH = 24

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "norm_topk_prob": True,
        },
    ),
}  # fmt: skip


def save_model(directory: Path, family: str = "llama", head: str = "lm", **overrides: Any) -> Path:
    """Write a four-layer checkpoint with norms and biases that are not trivial."""
    import transformers  # not at the top: the ranks do without

    class_name, own = _FAMILIES[family]
    sizes = dict(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=56, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rms_norm_eps=1e-5, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    auto_class = transformers.AutoModelForCausalLM
    if head == "scalar":
        auto_class = transformers.AutoModelForSequenceClassification
        sizes["num_labels"] = 1
    config = getattr(transformers, class_name)(**{**sizes, **own, **overrides})
    torch.manual_seed(7)
    model = auto_class.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@contextmanager
def engine(
    directory: Path,
    *,
    trainable: bool = True,
    head: str = "lm",
    bucket_size: int | None = None,
    **settings: Any,
) -> Iterator[MegatronEngine]:
    """A built engine on the calling ranks; its parallel groups end with the block.

    `bucket_size` elements instead of megatron-core's 40 million give a tiny model several
    gradient buckets.
    """
    short = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "first": "num_layers_in_first_pipeline_stage",
        "last": "num_layers_in_last_pipeline_stage",
    }
    settings = {short.get(key, key): value for key, value in settings.items()}
    defaults = dict(lr=1e-2, weight_decay=0.1, clip_grad=0.5, dtype="float32")
    made = MegatronEngine(
        ModelArgs(load=str(directory), **{**defaults, **settings}), trainable=trainable, head=head
    )
    ddp_config = optimizer.DistributedDataParallelConfig
    try:
        optimizer.DistributedDataParallelConfig = partial(ddp_config, bucket_size=bucket_size)
        made.build()
        yield made
    finally:
        optimizer.DistributedDataParallelConfig = ddp_config
        made.shutdown()


def batch(rows: int = 8, seed: int = 5) -> dict[str, torch.Tensor]:
    """Samples of different lengths in the form of data/batch.py, without texts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB_SIZE, (rows, SEQ_LENGTH), generator=generator)
    mask = torch.zeros(rows, SEQ_LENGTH)
    for row in range(rows):
        length = int(torch.randint(8, SEQ_LENGTH - 2, (), generator=generator))
        tokens[row, length:] = 2
        mask[row, 4:length] = 1.0
    return {"all_tokens": tokens, "loss_mask": mask}


def negative_logprobs(micro_batch, logprobs, entropy):
    """Supervised loss: mean over the tokens of the 8 rows of `batch()`."""
    mask = micro_batch["loss_mask"][:, 1:]
    return -(logprobs * mask).sum() / 100.0, {"entropy": (entropy * mask).sum()}


def squared_errors(micro_batch, values):
    """Loss of a value model: squared distance to the targets of `batch_with_returns`."""
    error = (values[:, :-1] - micro_batch["returns"]) * micro_batch["loss_mask"][:, 1:]
    return error.square().sum() / 100.0, {"error": error.sum()}


def batch_with_returns() -> dict[str, torch.Tensor]:
    """`batch()` with targets for a value model."""
    generator = torch.Generator().manual_seed(3)
    return {**batch(), "returns": torch.randn(8, SEQ_LENGTH - 1, generator=generator)}


def micro_batches(
    rows: dict[str, torch.Tensor], micro_batch_size: int = 2
) -> list[dict[str, torch.Tensor]]:
    """A batch cut into micro-batches of one size, in order."""
    return [take(rows, group) for group in equal_groups(len(rows["all_tokens"]), micro_batch_size)]


def rows_of_rank(engine: MegatronEngine, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This data parallel rank's share of a batch."""
    mine = slice(engine.data_parallel_rank, None, engine.data_parallel_size)
    return {key: value[mine] for key, value in rows.items()}


def shard(
    engine: MegatronEngine,
    micro_batch_size: int = 2,
    rows: dict[str, torch.Tensor] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of this data parallel rank's rows, by default its share of `batch()`."""
    if rows is None:
        rows = rows_of_rank(engine, batch() if engine.head == "lm" else batch_with_returns())
    groups = engine.batching.group_rows(rows, micro_batch_size, is_optimizer_step=True)
    return [take(rows, group) for group in groups]


def train(
    engine: MegatronEngine,
    steps: int,
    micro_batch_size: int = 2,
    rows: dict[str, torch.Tensor] | None = None,
) -> list[list[float]]:
    """[loss, grad_norm] of some steps on the micro-batches of `shard`."""
    micro_batches = shard(engine, micro_batch_size, rows)
    loss_fn = negative_logprobs if engine.head == "lm" else squared_errors
    curve = []
    for _ in range(steps):
        metrics, _ = engine.train_step(micro_batches, loss_fn)
        curve.append([metrics["loss"], metrics["grad_norm"]])
    return curve


def offloading_curve(engine: MegatronEngine) -> list[list[float]]:
    """[loss, grad_norm] of three steps; before each, some of the state is away and comes back."""
    curve = []
    for part in ({}, {"weights": False}, {"optimizer": False, "grads": False}):
        engine.offload(**part)
        engine.onload(**part)
        curve += train(engine, 1)
    return curve
