"""How does a draft get weights that are read from files, or come whole, through vLLM's loader?"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch

from chatlearn_vllm.engines import vllm_compat


def load_draft(engine: Any, source: str | Iterator[tuple[str, torch.Tensor]]) -> None:
    """Read a draft's weights, as vLLM does with those of the model that verifies.

    vLLM builds a `draft_model` with the `load_format` of the model that verifies, whatever
    `draft_load_config` says: with random weights, where those come from a weight sync.

    Args:
        engine: with a draft that is a model.
        source: the directory of the weights, or whole tensors by their Hugging Face names.

    Raises:
        DraftUntouchedError: the directory cannot be read, or lacks a layer that is the draft's own.
    """
    with vllm_compat.unpacked_cpu_weights():
        engine.collective_rpc(_load_draft, args=(source,))


class DraftUntouchedError(ValueError):
    """Weights that a draft cannot be given; it has those that it had."""


def _load_draft(worker: Any, source: str | Iterator[tuple[str, torch.Tensor]]) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    draft = vllm_compat.draft_of(worker)
    if isinstance(source, str):
        source = _tensors_of_the_draft(worker, draft, source)
    with set_current_vllm_config(worker.vllm_config), vllm_compat.buffers_keep_their_kind(draft):
        initialize_layerwise_reload(draft)
        draft.load_weights(source)
        config = worker.vllm_config.speculative_config
        finalize_layerwise_reload(draft, config.draft_model_config)


def _tensors_of_the_draft(
    worker: Any, draft: torch.nn.Module, directory: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of a directory that vLLM shall write into the draft; the first is read by now.

    Not what the draft shares with its target: vLLM would write the file's into both.
    """
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    speculative = worker.vllm_config.speculative_config
    loader = get_model_loader(speculative.draft_load_config or LoadConfig())
    config = copy.copy(speculative.draft_model_config)
    config.model = directory
    targets = {id(parameter) for parameter in worker.get_model().parameters()}
    shared = {
        name.split(".")[-2]
        for name, parameter in draft.named_parameters()
        if id(parameter) in targets
    }
    try:
        if not os.path.isdir(directory):
            raise FileNotFoundError("no such directory")
        own = {name for name in ("embed_tokens", "lm_head") if vars(draft).get(f"has_own_{name}")}
        if own := own - shared:
            names = [name for name, _ in loader.get_all_weights(config, draft)]
            own = {layer for layer in own if not any(layer in name for name in names)}
        if own:
            raise ValueError(
                f"the draft has its own {' and '.join(sorted(own))}, and these files have none; "
                "add it to them, or begin the job with this draft"
            )
        tensors = (
            (name, tensor)
            for name, tensor in loader.get_all_weights(config, draft)
            if shared.isdisjoint(name.split(".")[-2:-1])
        )
        if (first := next(tensors, None)) is None:
            raise ValueError("no weights of this draft are there")
    except Exception as error:  # vLLM and safetensors raise of all kinds
        raise DraftUntouchedError(f"load_draft({directory!r}): {error}") from error
    return itertools.chain([first], tensors)
