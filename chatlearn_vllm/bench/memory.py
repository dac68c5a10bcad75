"""How much memory do a model's weights and its KV cache take, and what fits?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from chatlearn_vllm.layouts import ModelShape

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
OVERHEAD_BYTES = 3 * 2**30
"""Per GPU beside weights and KV cache: CUDA context, activations, graphs; an estimate."""
GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """What one rank of an engine holds."""

    weight_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, shape: ModelShape, dtype: str, tp: int, pp: int) -> Needs:
        """Of one rank; pipeline stages are taken to be equal.

        Args:
            shape: sizes of the model.
            dtype: of weights and KV cache, a key of ELEMENT_BYTES.
            tp: tensor parallel size.
            pp: pipeline parallel size.
        """
        element = ELEMENT_BYTES[dtype]
        heads = math.ceil(shape.num_query_groups / tp)
        layers = math.ceil(shape.num_layers / pp)
        return cls(
            weight_bytes=math.ceil(num_parameters(shape) * element / (tp * pp)),
            kv_bytes_per_token=2 * heads * shape.head_dim * layers * element,
        )

    def longest_sequence(self, num_bytes: float) -> int:
        """Tokens of one sequence that fit beside the weights into so many bytes of a GPU."""
        room = num_bytes - self.weight_bytes - OVERHEAD_BYTES
        return max(0, int(room // self.kv_bytes_per_token))


def num_parameters(shape: ModelShape) -> int:
    """Of the whole model."""
    return sum(math.prod(shape.tensor_shape(name)) for name in shape.tensor_names())


def gib(num_bytes: float) -> str:
    """Bytes as text."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.0f} MiB"
