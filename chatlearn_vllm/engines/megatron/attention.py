"""How is attention computed without Transformer Engine and without an s x s matrix?"""

import inspect
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule


def packed_seq_params(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    """Say to megatron-core which sequences lie behind each other, without gaps.

    Args:
        lengths: tokens of each sequence.
        device: that of the model.
    """
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    on_device = starts.to(device, non_blocking=True)
    # megatron-core's rotary embedding takes the padded starts where they are given, and reads them
    # on the host in every layer: from device memory it would wait for the device each time. It
    # takes a maximum that equals the sum for a sign that positions go on from row to row.
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        cu_seqlens_q_padded=starts,
        cu_seqlens_kv_padded=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def check_takes_packed(modules: Iterable[torch.nn.Module]) -> None:
    """Check that the attention of a model can keep packed sequences apart.

    Raises:
        ValueError: a user's `model_provider` chose megatron-core's own attention.
    """
    if any(
        isinstance(part, DotProductAttention) for module in modules for part in module.modules()
    ):
        raise ValueError(
            "sequence_packing=True: megatron-core's DotProductAttention, which model_provider() "
            "chose, cannot keep packed sequences apart; use SDPACoreAttention of "
            "chatlearn_vllm/engines/megatron/attention.py, or set sequence_packing: False"
        )


class SDPACoreAttention(MegatronModule):
    """Causal attention by torch's scaled_dot_product_attention, in place of DotProductAttention.

    megatron-core's own module builds the s x s matrix and repeats keys and values for every query
    head. Takes dense batches and packed sequences (`qkv_format="thd"`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object = None,
    ) -> None:
        """Signature of a core attention in a megatron-core layer spec.

        Raises:
            ValueError: context parallelism is asked for.
        """
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError(
                f"context_parallel_size={config.context_parallel_size} is not supported, must be 1"
            )
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: object = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend causally; masks other than the causal one are not supported.

        Args:
            query: [s, b, heads, d], or [t, heads, d] when packed.
            key: [s, b, groups, d] or [t, groups, d]; each group serves heads / groups queries.
            value: as `key`.
            attention_mask: must be None.
            attn_mask_type: not used, the mask is causal.
            attention_bias: must be None.
            packed_seq_params: where each packed sequence starts, see `packed_seq_params`; None for
                a dense batch.

        Returns:
            [s, b, heads * d], or [t, heads * d] when packed.
        """
        assert attention_mask is None and attention_bias is None, "only causal attention"
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params, dropout)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, h, s, d]
        return self._causal(query, key, value, dropout).permute(2, 0, 1, 3).flatten(2)

    def _causal(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        """[b, heads, s, d] x [b, groups, s, d] -> [b, heads, s, d]."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            dropout_p=dropout,
            enable_gqa=query.size(1) != key.size(1),
        )

    def _packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams,
        dropout: float,
    ) -> torch.Tensor:
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        if query.is_cuda and is_half and dropout == 0.0:
            return self._varlen(query, key, value, packed.cu_seqlens_q, packed.max_seqlen_q)
        on_host = packed.cu_seqlens_q_padded
        lengths = (packed.cu_seqlens_q if on_host is None else on_host).diff().tolist()
        outputs = []
        for q, k, v in zip(
            query.split(lengths), key.split(lengths), value.split(lengths), strict=True
        ):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, h, s, d]
            outputs.append(self._causal(q, k, v, dropout).squeeze(0).transpose(0, 1))
        return torch.cat(outputs).flatten(1)

    def _varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, object] = {"window_size": (-1, 0)}  # causal
        # torch 2.11 takes fewer key/value heads as they are, 2.13 wants to be told.
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = query.size(1) != key.size(1)
        if self.softmax_scale is not None:
            options["scale"] = self.softmax_scale
        query, key, value = (x.contiguous() for x in (query, key, value))
        return varlen_attn(
            query, key, value, starts, starts, max_length, max_length, **options
        ).flatten(1)
