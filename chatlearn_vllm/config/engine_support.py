"""Which engine can do what, and what goes together?

One table for all: a job's checks read it, and `engine_tables.py` prints it into docs/engines.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn_vllm.config.beam_checks import key_of_beams
from chatlearn_vllm.config.model_files import read_config_json
from chatlearn_vllm.config.server_checks import START

if TYPE_CHECKING:
    from chatlearn_vllm.config.model_args import ModelArgs
    from chatlearn_vllm.config.schema import ModelConfig, RuntimeConfig

YES = "yes"
CHECKPOINT_QUANTIZATION = ("awq", "auto_awq", "awq_marlin", "gptq", "auto_gptq", "gptq_marlin")
"""Ways in which a checkpoint is quantised already; no trainer's weights are."""
IN_HOST_MEMORY = {
    "cpu_offload_gb": "weights in host memory, read by the GPU",
    "offload_group_size": "weights in host memory, fetched layer by layer",
}
"""Arguments of vLLM that take weights off the device, where they are not 0 -> what they do."""
NGRAM_METHODS = ("ngram", "ngram_gpu", "suffix")
"""Methods that draft from the tokens so far."""
DRAFT_DIR_METHODS = ("draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "dflash")
"""Methods whose drafts come from weights in a directory of their own."""
METHODS_OF_ANY_LENGTH = ("ngram", "draft_model", "eagle", "eagle3", "mtp")
"""Methods that can be asked for fewer drafts, and for none, in a running engine; vLLM's others fail
in the middle of such a step."""
DRAFT_SAMPLE_METHODS = ("greedy", "probabilistic")
"""A draft proposes what it finds most probable, or draws; vLLM's default is the first."""
METHODS = (*NGRAM_METHODS, *DRAFT_DIR_METHODS, "mtp", "dspark", "custom_class")
"""Of speculative decoding; vLLM's `extract_hidden_states` drafts nothing."""


def draws_drafts(args: ModelArgs) -> bool:
    """Whether drafts are drawn from the draft's own distribution."""
    return (args.speculative_config or {}).get("draft_sample_method") == "probabilistic"


@dataclass(frozen=True)
class Feature:
    """Something that a user can ask of the model that generates."""

    title: str
    key: str
    """What asks for it; a dotted key of the model's entry, or of the job after a colon."""
    is_asked_for: Callable[[ModelArgs, ModelConfig, RuntimeConfig], bool]
    vllm: str
    """`yes`, `yes, ...` or why not, as is told to who asks for it."""
    transformers: str
    server: str
    cpu: str = YES
    """The same for vLLM on a machine without GPUs."""
    started: str | None = None
    """The same for a server that the job starts; None = as for `server`."""

    @property
    def started_server(self) -> str:
        """What a server can do that the job starts."""
        if self.started is None:
            return _NOT_PASSED_ON if self.server == _OF_SERVER else self.server
        return self.started


_ONE_RANK = "works with one rank per replica; set {key}: 1, or inference_engine: vllm"
_VLLM_ONLY = "is vLLM's; leave it out, or set inference_engine: vllm"
_OF_SERVER = "is up to the server; leave it out here, and start the server with it"
_NOT_PASSED_ON = (
    "is not passed on to a server that the job starts; leave it out, or start a server with it "
    "yourself and name its URL in vllm_server"
)


def _method(*names: str) -> Callable[[ModelArgs, ModelConfig, RuntimeConfig], bool]:
    return lambda args, model, runtime: (args.speculative_config or {}).get("method") in names


def _is_always_fine(args: ModelArgs, model: ModelConfig, runtime: RuntimeConfig) -> bool:
    """For features that no job has to be refused for."""
    return False


FEATURES: Mapping[str, Feature] = {
    "tensor parallel": Feature(
        "tensor parallel rollout", "tensor_model_parallel_size",
        lambda args, model, runtime: model.tensor_model_parallel_size > 1,
        YES, _ONE_RANK, _OF_SERVER, started=YES,
    ),
    "pipeline parallel": Feature(
        "pipeline parallel rollout", "pipeline_model_parallel_size",
        lambda args, model, runtime: model.pipeline_model_parallel_size > 1,
        YES, _ONE_RANK, _OF_SERVER, started=YES,
    ),
    "expert parallel": Feature(
        "experts whole on a rank", "enable_expert_parallel",
        lambda args, model, runtime: args.enable_expert_parallel,
        YES, _VLLM_ONLY, _OF_SERVER,
    ),
    "ngram": Feature(
        "drafts: n-grams", "speculative_config",
        _method("ngram"), YES, _VLLM_ONLY, _OF_SERVER,
    ),
    "ngram_gpu": Feature(
        "drafts: n-grams, found on the GPU", "speculative_config",
        _method("ngram_gpu"), YES, _VLLM_ONLY, _OF_SERVER,
        cpu="works on GPUs only; set method: ngram",
    ),
    "draft_model": Feature(
        "drafts: a small model", "speculative_config",
        _method("draft_model"), YES, _VLLM_ONLY, _OF_SERVER,
    ),
    "eagle": Feature(
        "drafts: EAGLE, EAGLE-3", "speculative_config",
        _method("eagle", "eagle3"), YES, _VLLM_ONLY, _OF_SERVER,
    ),
    "medusa": Feature(
        "drafts: Medusa", "speculative_config",
        _method("medusa"), YES, _VLLM_ONLY, _OF_SERVER,
    ),
    "other drafts": Feature(
        "drafts: MTP, suffix, ...", "speculative_config",
        _method(
            *(set(METHODS) - {"ngram", "ngram_gpu", "draft_model", "eagle", "eagle3", "medusa"})
        ),
        "yes, not tested here", _VLLM_ONLY, _OF_SERVER,
    ),
    "fp8": Feature(
        "weights quantised to fp8", "quantization",
        lambda args, model, runtime: args.quantization == "fp8",
        YES, _VLLM_ONLY, _OF_SERVER,
        cpu="works on GPUs only; leave it out",
    ),
    "awq, gptq": Feature(
        "AWQ and GPTQ checkpoints", "quantization",
        lambda args, model, runtime: args.quantization in CHECKPOINT_QUANTIZATION,
        "yes, for models that no trainer sends weights to", _VLLM_ONLY, _OF_SERVER,
        cpu="yes, in bfloat16",
    ),
    "other quantization": Feature(
        "other quantised weights", "quantization",
        lambda args, model, runtime: args.quantization
        not in (None, "fp8", *CHECKPOINT_QUANTIZATION),
        "yes, not tested here", _VLLM_ONLY, _OF_SERVER,
        cpu="yes, not tested here",
    ),
    **{
        key: Feature(
            title, key,
            lambda args, model, runtime, key=key: bool(args.engine_args.get(key)),
            "yes, for models that no trainer sends weights to", _VLLM_ONLY, _OF_SERVER,
            cpu="works on GPUs only; leave it out",
        )
        for key, title in IN_HOST_MEMORY.items()
    },
    "partial rollouts": Feature(
        "partial rollouts", ":runtime.max_rollout_round",
        lambda args, model, runtime: runtime.max_rollout_round > 1,
        YES,
        "needs vLLM; set runtime.max_rollout_round: 1, or inference_engine: vllm",
        "needs vLLM in the job's own processes; set runtime.max_rollout_round: 1, or "
        "inference_engine: vllm",
    ),
    "sleep level 2": Feature(
        "weights dropped while others work", "sleep_level", _is_always_fine,
        "yes; a frozen draft's weights wait in host memory", YES, _OF_SERVER,
        cpu="yes, and gives no memory back", started=YES,
    ),
    "LoRA": Feature(
        "a trainer with adapters", "lora_r", _is_always_fine,
        "yes, merged at each weight sync", "yes, merged at each weight sync",
        "yes, merged at each weight sync",
    ),
    "direct copy": Feature(
        "weight sync into live parameters", "weight_sync_path",
        lambda args, model, runtime: args.weight_sync_path == "direct",
        YES,
        YES,
        "takes whole tensors only; set weight_sync_path: auto",
    ),
    "beam search": Feature(
        "beam search, in training or evaluation", "num_beams",
        lambda args, model, runtime: any(
            args.beam_width(is_eval=is_eval) > 1 for is_eval in (False, True)
        ),
        "yes, with vLLM's scores", "yes, with Hugging Face's scores",
        "needs an engine in the job's own processes; set inference_engine: vllm",
    ),
}  # fmt: skip
"""By the name that `NOT_TOGETHER` knows them by."""


@dataclass(frozen=True)
class Clash:
    """Features of vLLM's engine that do not go together with another."""

    these: tuple[str, ...]
    other: str
    why: str
    """What is told, at the key of these."""


NOT_TOGETHER: tuple[Clash, ...] = (
    Clash(
        ("ngram", "ngram_gpu", "draft_model", "eagle", "medusa", "other drafts"),
        "pipeline parallel",
        "drafts are made on the last pipeline stage only, and the ranks of a replica schedule for "
        "themselves; set pipeline_model_parallel_size: 1 and a larger "
        "tensor_model_parallel_size, or leave speculative_config out",
    ),
    Clash(
        ("direct copy",),
        "fp8",
        "vLLM's parameters hold quantised weights then; set weight_sync_path: auto",
    ),
)


def quantization_of_checkpoint(args: ModelArgs) -> str | None:
    """How the checkpoint in `load` is quantised; None if it is not."""
    if args.quantization in CHECKPOINT_QUANTIZATION:
        return args.quantization
    return (read_config_json(args.load).get("quantization_config") or {}).get("quant_method")


def asked_for(model: ModelConfig, runtime: RuntimeConfig) -> list[str]:
    """Names of the features that a job asks of a model that generates."""
    args = model.model_args
    return [name for name, one in FEATURES.items() if one.is_asked_for(args, model, runtime)]


def conflicts(model: ModelConfig, runtime: RuntimeConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a model that generates is asked for and cannot do.

    Returns:
        Keys and what is wrong with their values.
    """
    names = asked_for(model, runtime)
    args = model.model_args
    engine = args.inference_engine
    column = "started_server" if args.vllm_server == (START,) else engine
    for name in names:
        feature = FEATURES[name]
        verdict = getattr(feature, column)
        if not verdict.startswith(YES):
            yield _key(feature, model), verdict.format(key=feature.key)
    if engine != "vllm":
        return
    for clash in NOT_TOGETHER:
        for name in names:
            if name in clash.these and clash.other in names:
                yield _key(FEATURES[name], model), clash.why


def cpu_problem(model: ModelConfig, runtime: RuntimeConfig) -> str | None:
    """Why vLLM cannot do on a machine without GPUs what it is asked for; None if it can."""
    for name in asked_for(model, runtime):
        feature = FEATURES[name]
        if not feature.cpu.startswith(YES):
            return f"models.{model.name}: {feature.title} ({feature.key}) {feature.cpu}"
    return None


def _key(feature: Feature, model: ModelConfig) -> tuple[str, ...]:
    if feature.key.startswith(":"):
        return tuple(feature.key[1:].split("."))
    name = key_of_beams(model.model_args) if feature is FEATURES["beam search"] else feature.key
    return ("models", model.name, "model_args", name)
