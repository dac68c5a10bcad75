"""What are the weights of a policy that is made from nothing?"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from chatlearn_vllm.layouts import ModelShape


class RandomWeights:
    """Logical (Hugging Face) tensors drawn from a seed: equal for any parallel sizes.

    Linear and embedding weights are normal with the config's `initializer_range`; the two that
    write into the residual stream are divided by sqrt(2 * num_layers) (A. Radford et al. 2019,
    "Language Models are Unsupervised Multitask Learners", section 2.3). Norms are one, biases
    zero. A tensor depends on the seed and its own name and shape only.
    """

    def __init__(self, hf_config: Mapping[str, Any], seed: int) -> None:
        self._shape = ModelShape.from_hf_config(hf_config)
        self._std = hf_config.get("initializer_range", 0.02)
        self._seed = seed
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, rect: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """The given rectangle of a logical tensor, float32 on the CPU."""
        if self._last is None or self._last[0] != name:
            self._last = (name, self._draw(name))
        return self._last[1][tuple(slice(*bounds) for bounds in rect)]

    def _draw(self, name: str) -> torch.Tensor:
        size = self._shape.tensor_shape(name)
        if name.endswith("norm.weight"):
            return torch.ones(size)
        if name.endswith(".bias"):
            return torch.zeros(size)
        std = self._std
        if name.endswith(("o_proj.weight", "down_proj.weight", ".w2.weight")):
            std /= math.sqrt(2 * self._shape.num_layers)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(size).normal_(0.0, std, generator=generator)
