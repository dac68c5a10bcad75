"""The model computes what Hugging Face's computes, and so do log-probabilities and entropy."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from chatlearn_vllm.engines.megatron.cpu import cuda_means_cpu
from chatlearn_vllm.engines.megatron.logprobs import vocab_parallel_logprobs
from tests.megatron import tiny_models

MODELS = {
    "llama": ("llama", {}),
    "llama tied, all heads with keys": (
        "llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }
        },
    ),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory and Hugging Face logits [8, S, V] of each model."""
    made = {}
    for name, (family, overrides) in MODELS.items():
        path = tiny_models.save_model(tmp_path_factory.mktemp("model"), family, **overrides)
        reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            made[name] = (path, reference(tiny_models.batch()["all_tokens"]).logits)
    return made


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        *[(name, tp, pp) for name in ("llama", "qwen2 tied") for tp in (1, 2) for pp in (1, 2)],
        *[(name, 2, 2) for name in MODELS if name not in ("llama", "qwen2 tied")],
        ("qwen3", 1, 1),
    ],
)
def test_logits_equal_those_of_hugging_face(ranks, models, name, tp, pp):
    path, expected = models[name]
    found = ranks[tp * pp].run(logits, path, tp=tp, pp=pp)[-1]
    assert (found - expected).abs().max() < 1e-4


def test_more_tensor_parallel_ranks_than_key_value_heads(ranks, models):
    path, expected = models["llama"]
    found = ranks[4].run(logits, path, tp=4, sequence_parallel=True)[-1]
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("world_size", [1, 2])
def test_logprobs_and_entropy_equal_a_plain_softmax(ranks, world_size):
    for differences in ranks[world_size].run(logprob_differences):
        assert max(differences) < 3e-6


def test_packed_sequences_attend_as_separate_ones():
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig

    from chatlearn_vllm.engines.megatron.attention import SDPACoreAttention

    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4,
                               num_query_groups=2, attention_dropout=0.0)  # fmt: skip
    attention = SDPACoreAttention(config, 1, None, "self")
    torch.manual_seed(0)
    query, key, value = (torch.randn(12, heads, 16) for heads in (4, 2, 2))  # [t, h, d]
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = PackedSeqParams("thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    found = attention(query, key, value, packed_seq_params=packed)
    expected = [
        attention(*(x[start:stop].unsqueeze(1) for x in (query, key, value))).squeeze(1)
        for start, stop in ((0, 5), (5, 12))
    ]
    assert found.shape == (12, 64)
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "supported: llama, qwen2, qwen3"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "yarn"),
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(change, message, tmp_path):
    from chatlearn_vllm.engines.megatron.architectures import rope_settings, transformer_config

    config = transformers.LlamaConfig().to_dict() | change
    with pytest.raises(ValueError, match=message):
        transformer_config(config)
        rope_settings(config)


def logits(path: Path, **settings) -> torch.Tensor | None:
    """All logits [8, S, V] on the last rank, None on earlier pipeline stages."""
    with tiny_models.engine(path, trainable=False, **settings) as engine:
        captured = []

        def capture(module, args, output):
            captured.append(output[0].transpose(0, 1).contiguous())  # [s, b, V/tp] -> [b, s, V/tp]

        head = engine.chunks[-1].output_layer if engine.chunks[-1].post_process else None
        if head is not None:
            head.register_forward_hook(capture)
        micro_batches = tiny_models.micro_batches({"all_tokens": tiny_models.batch()["all_tokens"]})
        engine.forward_only(micro_batches, lambda batch, logprobs, entropy: logprobs)
        if head is None:
            return None
        local = torch.cat(captured)
        shards = [torch.empty_like(local) for _ in range(settings["tp"])]
        from megatron.core import parallel_state

        dist.all_gather(shards, local, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(shards, -1)[..., : tiny_models.VOCAB_SIZE]


def logprob_differences() -> list[float]:
    """Largest differences of values and gradient from torch's softmax, with padded columns."""
    from chatlearn_vllm.engines.process_group import join_process_group

    join_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()
    rows, vocab, padded, temperature = 37, 125, 128, 0.7
    generator = torch.Generator().manual_seed(1)
    full = 3 * torch.randn(rows, padded, generator=generator)
    full[:, vocab:] = 50.0  # would dominate the softmax if they counted
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    weights = torch.randn(2, rows, generator=generator)

    reference = full[:, :vocab].clone().requires_grad_()
    log_p = (reference / temperature).log_softmax(1)
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()

    mine = full.chunk(size, 1)[rank].clone().requires_grad_()
    before = mine.detach().clone()
    with cuda_means_cpu():
        found = vocab_parallel_logprobs(
            mine, targets, vocab_size=vocab, temperature=temperature, group=dist.group.WORLD,
            chunk_rows=8,
        )  # fmt: skip
        (weights[0] * found[0] + weights[1] * found[1]).sum().backward()
    assert torch.equal(mine.detach(), before), "logits were overwritten"
    grad = torch.nn.functional.pad(reference.grad, (0, padded - vocab)).chunk(size, 1)[rank]
    dist.destroy_process_group()
    pairs = [(found[0], logprobs), (found[1], entropy), (mine.grad, grad)]
    return [float((a - b).abs().max()) for a, b in pairs]
