"""Which engine generates for a policy, and what of its yaml does that get?"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chatlearn_vllm.config.engine_support import cpu_problem, draws_drafts
from chatlearn_vllm.engines import vllm_compat
from chatlearn_vllm.engines.vllm_arguments import (
    engine_arguments,
    resolve_dtype,
    sampling_arguments,
)
from chatlearn_vllm.layouts import ModelShape
from chatlearn_vllm.observability.logging import get_logger

if TYPE_CHECKING:
    from chatlearn_vllm.engines.generation_engine import GenerationEngine
    from chatlearn_vllm.modules.vllm_module import VLLMModule

logger = get_logger(__name__)


def make_engine(policy: VLLMModule, model_dir: Path) -> GenerationEngine:
    """Build the engine of this rank; collective over the replica's ranks.

    Args:
        policy: whose `on_step` is called once per scheduled batch.
        model_dir: Hugging Face directory of the model.

    Raises:
        ValueError: the engine refuses its arguments, or cannot do here what it is asked for.
        ServerStartError: a server did not come up.
    """
    shape = ModelShape.from_hf_config(json.loads((model_dir / "config.json").read_text()))
    make = {"vllm": _vllm_engine, "transformers": _transformers_engine, "server": _server_engine}
    return make[policy.model_args.inference_engine](policy, model_dir, shape)


def _vllm_engine(policy: VLLMModule, model_dir: Path, shape: ModelShape) -> GenerationEngine:
    from chatlearn_vllm.engines.vllm_engine import VLLMEngine

    args = policy.model_args
    on_gpu, is_first = torch.cuda.is_available(), policy.rank == policy.replica_id == 0
    if not on_gpu and (problem := cpu_problem(policy.module_args, policy.runtime_args)):
        raise ValueError(problem)
    seed = args.seed + policy.replica_id
    arguments, notices = engine_arguments(args, model_dir, shape, seed=seed, on_gpu=on_gpu)
    if is_first:
        for notice in notices:
            logger.info("%s: %s", policy.name, notice)
    # Numbers that drafts are drawn with come from the rollout's seed.
    default = not on_gpu and not draws_drafts(args)
    own = default if args.seed_per_response is None else args.seed_per_response
    asked = [sampling_arguments(args, is_eval=is_eval) for is_eval in (False, True)]
    tokenize = partial(_token_ids, policy)
    for keys in asked:
        vllm_compat.allow_bad_words(keys, tokenize)
    reasons = [vllm_compat.why_older_model_runner(keys, tokenize) for keys in asked]
    if is_first and (reason := next(filter(None, reasons), None)):
        logger.info("%s: runs vLLM's older model runner, for the sake of %s", policy.name, reason)
    engine = VLLMEngine(
        arguments, shape, owner=policy, seed_per_response=own, older_model_runner=any(reasons)
    )
    if is_first and engine.speculation is not None and engine.speculation.goes_on_because:
        because = engine.speculation.goes_on_because
        logger.info("%s: no effect of speculative_min_gain: %s", policy.name, because)
    return engine


def _transformers_engine(
    policy: VLLMModule, model_dir: Path, shape: ModelShape
) -> GenerationEngine:
    from chatlearn_vllm.engines.hf_engine import HFEngine

    args = policy.model_args
    return HFEngine(
        model_dir,
        shape,
        policy.tokenizer.tokenizer,
        policy,
        dtype=resolve_dtype(args, on_gpu=torch.cuda.is_available()),
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.seq_length,
        load_format=args.load_format,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.engine_args.get("trust_remote_code", False),
        seed=args.seed + policy.replica_id,
    )


def _server_engine(policy: VLLMModule, model_dir: Path, shape: ModelShape) -> GenerationEngine:
    from chatlearn_vllm.engines.server_start import make_server_engine

    return make_server_engine(
        policy.model_args,
        name=policy.name,
        replica=policy.replica_id,
        rank=policy.rank,
        seed=policy.model_args.seed + policy.replica_id,
        log_dir=policy.runtime_args.run_dir / "vllm_server",
        model_dir=model_dir,
        shape=shape,
        tokenize=partial(_token_ids, policy),
        owner=policy,
    )


def _token_ids(policy: VLLMModule, text: str) -> list[int]:
    return policy.tokenizer.tokenizer.encode(text, add_special_tokens=False)
