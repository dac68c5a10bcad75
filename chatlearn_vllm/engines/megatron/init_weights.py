"""With which weights does a model begin: those of its directory, or random ones?"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from chatlearn_vllm.engines.megatron.hf_checkpoint import (
    HFWeights,
    LaidOut,
    check_complete,
    fill_parameters,
)
from chatlearn_vllm.layouts import SCORE, ModelShape

if TYPE_CHECKING:
    from chatlearn_vllm.config import ModelArgs

_SCORE_BIAS = "score.bias"
"""What a head with a bias has besides `SCORE`."""

logger = logging.getLogger(__name__)


def fill_weights(
    parameters: list[LaidOut],
    directory: Path,
    hf_config: Mapping[str, Any],
    shape: ModelShape,
    args: ModelArgs,
) -> bool:
    """Read the safetensors beside config.json, or draw random weights where there are none.

    Args:
        parameters: those of this rank; filled.
        directory: with config.json; its weights count only where `args.load` is set.
        hf_config: what config.json says.
        shape: sizes of the model, and what it ends with.
        args: seed of random weights.

    Returns:
        Whether a scalar head was found no weights for; it keeps those it was made with.

    Raises:
        ValueError: the weights do not fit, have another format, or a bias for a scalar head.
    """
    source: HFWeights | None = None
    if args.load and HFWeights.exist_in(directory):
        source = HFWeights(directory)
    elif unreadable := [*directory.glob("*.bin"), *directory.glob("*.pt")]:
        raise ValueError(
            f"{directory}: {unreadable[0].name} is not read; save the weights as safetensors"
        )
    elif dist.get_rank() == 0:
        logger.warning(
            "%s has config.json and no weights: starting from random ones, seed %d",
            directory,
            args.seed,
        )
    is_head_new = shape.head == "scalar" and _is_head_missing(source, directory)
    if is_head_new:
        parameters = [one for one in parameters if one.layout.name != "output_layer.weight"]
    if source is not None:
        check_complete(parameters, source, shape)
    fill_parameters(parameters, source or RandomWeights(hf_config, args.seed))
    return is_head_new


def _is_head_missing(source: HFWeights | None, directory: Path) -> bool:
    """Whether there are no weights of a scalar head; said once.

    Raises:
        ValueError: the head has a bias, which would be lost.
    """
    if source is not None and _SCORE_BIAS in source:
        raise ValueError(
            f"{directory}: {_SCORE_BIAS} is not supported, a scalar head has no bias "
            "(*ForTokenClassification models have); load a *ForSequenceClassification model"
        )
    if source is not None and SCORE in source:
        return False
    if dist.get_rank() == 0:
        logger.warning("%s has no %s: the scalar head starts from zeros", directory, SCORE)
    return True


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
