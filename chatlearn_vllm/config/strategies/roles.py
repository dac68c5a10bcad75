"""What does a role of a strategy file become?"""

from __future__ import annotations

import math
from typing import Any

from chatlearn_vllm.config.devices import parse_device_mapping, uneven_replicas
from chatlearn_vllm.config.problems import Key
from chatlearn_vllm.config.strategies import keys, strategy_keys
from chatlearn_vllm.config.strategies.fields import (
    ALL_LORA_LAYERS,
    RECOMPUTE,
    megatron_fields,
    sampling_fields,
    vllm_fields,
)
from chatlearn_vllm.config.strategies.given import Given, Translation
from chatlearn_vllm.config.tree import BROKEN
from chatlearn_vllm.config.upstream_fields import upstream_fields

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ATTENTION = {
    "fa2": "flash_attention_2",
    "flash_attention_2": "flash_attention_2",
    "sdpa": "sdpa",
    "eager": "eager",
    "auto": None,
}
_LORA_LAYERS = {
    "q_proj": "linear_qkv", "k_proj": "linear_qkv", "v_proj": "linear_qkv",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1", "up_proj": "linear_fc1",
    "down_proj": "linear_fc2",
}  # fmt: skip

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_MICRO_BATCHES = (
    "use_dynamic_batching_in_train", "max_tokens_per_microbatch_in_train",
    "use_dynamic_batching_in_infer", "max_tokens_per_microbatch_in_infer",
    "use_sequence_packing", "sequence_packing_args",
)  # fmt: skip
_REFUSED_MODEL_ARGS = {
    "freeze_module_prefix": "no part of a model can be frozen here, the models trained are of text",
    "ulysses_size": "must be 1, a sequence is not split over ranks here",
    "adapter_name_or_path": "adapters start anew here; merge them into the checkpoint",
    "model_config_kwargs": "a model is as its config.json says; change it there",
    "additional_target": "adapters are trained on linear layers only; leave it out",
}
ONLY_WITH_BEAMS = "only with num_beams above 1, which searches"
"""Why a length_penalty has no effect."""


class Role:
    """One role of the file, and its model.

    Args:
        translation: takes the model's keys.
        path: of the role, e.g. ("actor_infer",) or ("rewards", "math_rule").
        model: the model's name in the job.
        kind: the role's name in `STRATEGIES_OF_ROLE`.
    """

    def __init__(self, translation: Translation, path: Key, model: str, kind: str) -> None:
        self.path, self.model = path, model
        self.t = translation
        self.kind = kind
        self.at: Key = ("models", model)
        translation.stands_for(self.at, path)
        table = keys.REWARD if kind == "rewards" else keys.ROLE
        self.given = Given(translation, path, table)
        strategy = Given(translation, (*path, "strategy_args"), strategy_keys.STRATEGY)
        self.strategy = self._strategy(strategy)
        self.model_args = Given(translation, (*path, "model_args"), keys.MODEL_ARGS)
        self.training_args = Given(translation, (*path, "training_args"), keys.TRAINING_ARGS)
        self.config = self._strategy_config(strategy.key("strategy_config"))
        self.num_devices = self._devices()
        # Every file has it for all roles, also for the one that vLLM generates with.
        idle = ("infer_batch_size",) if kind == "actor_infer" else ()
        for name in idle:
            self.given.get(name, int)  # its form is checked
        self.given.copy(self.at, *idle)
        self._attention()
        self._tell_unused()

    def put(self, name: str, value: Any, *written: Key) -> None:
        """Set a key of the model's arguments."""
        self.t.put((*self.at, "model_args", name), value, *written)

    # ---- what all roles have ----------------------------------------------------------------

    def _tell_unused(self) -> None:
        """Name what is of use in another role only."""
        trains = self.kind in ("actor_train", "critic")
        self.data_args = Given(self.t, (*self.path, "data_args"), keys.DATA_ARGS)
        if self.kind != "actor_train":
            self.data_args.refuse_rest("prompts are named in actor_train and validation")
        if not trains:
            self.training_args.refuse_rest("training is said in actor_train")
            adapters = "adapters are said in actor_train, and are merged for all others"
            for name in ("lora_target", "lora_rank", "lora_alpha", "lora_dropout"):
                if name in self.model_args and "lora_target" in self.model_args:
                    self.t.has_no_effect(self.model_args.key(name), adapters)
        if (
            self.kind != "actor_infer"
            and self.strategy != "vllm"
            and ("generating_args" in self.given)
        ):
            self.t.has_no_effect(self.given.key("generating_args"), "responses are actor_infer's")
        if self.strategy not in ("megatron_train", "megatron_infer"):
            for name in _MICRO_BATCHES:
                if self.given.values.get(name) not in (None, False, BROKEN):
                    self.t.has_no_effect(self.given.key(name), "of roles on megatron-core")
        if self.num_devices and "world_size" in self.given:
            self.t.has_no_effect(self.given.key("world_size"), "follows from device_mapping")
        if trains and "lora_target" not in self.model_args and "lora_rank" in self.model_args:
            self.t.has_no_effect(self.model_args.key("lora_rank"), "only with lora_target")

    def _attention(self) -> None:
        """Set what computes attention, where the role says it."""
        older, present = (
            self.model_args.values.get(name) for name in ("flash_attn", "attn_implementation")
        )
        if None not in (older, present) and older != present:
            rule = f"is the older name of attn_implementation={present}; keep one of them"
            self.t.report(self.model_args.key("flash_attn"), rule)
        for name in ("attn_implementation", "flash_attn"):
            value = self.model_args.choose(name, _ATTENTION, None)
            if name not in self.model_args:
                continue
            if self.kind == "actor_infer" and self.strategy == "hf_infer":
                self.put("attn_implementation", value or "sdpa", self.model_args.key(name))
            else:
                why = "vLLM and megatron-core choose their kernels"
                self.t.has_no_effect(self.model_args.key(name), why)

    def _strategy(self, given: Given) -> str | None:
        allowed = strategy_keys.STRATEGIES_OF_ROLE[self.kind]
        name = given.get("strategy_name", str)
        key = given.key("strategy_name")
        if name is None and self.kind == "rewards":
            self.is_supported = True
            return None
        self.is_supported = name in allowed
        if name in allowed:
            return name
        remedy = strategy_keys.UNSUPPORTED_STRATEGIES.get(
            name or "", f"takes {' or '.join(allowed)}"
        )
        if name == "hf_infer" and self.kind == "reference":
            remedy = (
                "a reference scores on megatron-core, which computes the trainer's numbers: set "
                "strategy_name: megatron_infer, with device_mapping as it is"
            )
        elif name is None:
            remedy = f"a role needs its strategy: {' or '.join(allowed)}"
        self.t.report(key if name else self.path, remedy)
        return allowed[0]

    def _strategy_config(self, path: Key) -> Given:
        if not self.is_supported:
            return Given(self.t, (*path, "of another strategy"), {})
        if self.strategy == "vllm" or self.kind == "actor_infer":
            return Given(self.t, path, strategy_keys.VLLM, vllm_fields())
        if self.strategy in ("megatron_train", "megatron_infer"):
            return Given(self.t, path, strategy_keys.MEGATRON, megatron_fields())
        return Given(self.t, path, {})

    def _devices(self) -> int:
        """Set the model's devices or processes; how many devices it has."""
        key = self.given.key("device_mapping")
        given = self.given.values.get("device_mapping")
        if given is BROKEN:
            self.t.put((*self.at, "num_gpu"), BROKEN, key)
            return 1
        if given is None:
            if self.kind != "rewards":
                self.t.report(self.path, "a role on GPUs needs its device_mapping")
                self.t.put((*self.at, "num_gpu"), BROKEN, self.path)
                return 1
            processes = self.given.get("world_size", int, 1, least=1)
            self.t.put((*self.at, "num_cpu"), processes, self.given.key("world_size"), self.path)
            return 0
        try:
            devices = parse_device_mapping(given)
            if not devices:
                raise ValueError(f"names no device{self._without_devices()}")
            if self.strategy == "vllm":
                # On megatron-core the sizes have our names, and the rule of all models says this.
                names = ("tensor_parallel_size", "pipeline_parallel_size")
                if rule := uneven_replicas(devices, {name: self._size(name) for name in names}):
                    raise ValueError(rule)
        except ValueError as error:
            self.t.report(key, str(error))
            self.t.put((*self.at, "device_mapping"), BROKEN, key)
            self.t.put((*self.at, "num_gpu"), BROKEN, key)
            return 1
        self.t.put((*self.at, "device_mapping"), list(devices), key)
        self.t.stands_for((*self.at, "num_gpu"), key)
        # Where models share devices; without effect for one that shares its own with no other.
        self.t.put((*self.at, "free_memory"), True, self.path)
        return len(devices)

    def _without_devices(self) -> str:
        if self.kind == "rewards":
            return "; leave it out for a reward on CPUs"
        return "; name some, as in list(range(0,8)) or [0, 1]"

    def weights(self, seed: Any, *fallbacks: Key) -> None:
        """Set checkpoint, type and seed.

        Args:
            seed: of the job.
            fallbacks: keys that name the checkpoint where the role does not.
        """
        own = self.model_args.key("model_name_or_path")
        for key in (own, *fallbacks):
            value = self.t.source.get(key)
            if value is not None:
                self.put("load", value, key)
                break
        for name, rule in _REFUSED_MODEL_ARGS.items():
            if self.model_args.values.get(name) not in (None, 1, ""):
                self.t.report(self.model_args.key(name), rule)
        dtype = self.model_args.choose("dtype", _DTYPES, "bfloat16")
        self.put("dtype", dtype, self.model_args.key("dtype"))
        self.model_args.get("disable_gradient_checkpointing", bool)  # of trainers; a bool in all
        self.put("seed", seed, ("seed",))

    # ---- engines ----------------------------------------------------------------------------

    def generates_with_strategy_config(self, *, load_format: str = "dummy") -> None:
        """Set the engine's arguments, vLLM's or those of ours that Transformers have, too.

        Args:
            load_format: where the file says none.
        """
        names = {
            "tensor_parallel_size": "tensor_model_parallel_size",
            "pipeline_parallel_size": "pipeline_model_parallel_size",
        }
        self.put("sleep_level", 1, self.config.key("sleep_level"))
        self.put("load_format", load_format, self.config.key("load_format"))
        for name, value in self.config.values.items():
            key = self.config.key(name)
            entry = strategy_keys.VLLM.get(name)
            if (elsewhere := strategy_keys.VLLM_SET_ELSEWHERE.get(name)) is not None:
                self.t.report(key, f"is set by {elsewhere}; leave it out")
            elif isinstance(entry, keys.NoEffect) or name == "max_model_len":
                continue
            elif value is not None and name not in self.config.unknown:
                self.put(names.get(name, name), value, key)
        if self.config.values.get("VLLM_USE_V1") in (0, "0", False):
            self.t.report(self.config.key("VLLM_USE_V1"), "must be 1: vLLM has the V1 engine only")

    def on_megatron(self) -> None:
        """Set megatron-core's arguments, and how rows become micro-batches."""
        additional = self.config.get("additional_configs", dict, {})
        known = upstream_fields()["transformer_args"]
        for name in [name for name in additional if name not in known]:
            self.t.report(
                (*self.config.key("additional_configs"), name),
                "is no field of megatron-core's TransformerConfig",
            )
        inner = {(*self.config.key("additional_configs"), n): v for n, v in additional.items()}
        inner = {key: value for key, value in inner.items() if key[-1] in known}
        own = {self.config.key(name): value for name, value in self.config.values.items()}
        for key, value in (own | inner).items():
            if key in own and key[-1] in self.config.unknown:
                continue
            entry = strategy_keys.MEGATRON.get(key[-1])
            if key[-1] == "recompute_modules":
                modules = value.split(",") if isinstance(value, str) else value
                self.put("recompute_modules", modules, key)
            elif entry is None and value is not None:
                self.put(key[-1], value, key)
        self._micro_batches()

    def _micro_batches(self) -> None:
        """Set how many tokens a pass of a model on megatron-core takes."""
        in_train = self.kind in ("actor_train", "critic")
        suffix, other = ("train", "infer") if in_train else ("infer", "train")
        packing = Given(self.t, self.given.key("sequence_packing_args"), keys.PACKING)
        packed = f"max_packed_sequence_length_{'train' if in_train else 'forward'}"
        is_packed = self.given.get("use_sequence_packing", bool, False)
        if is_packed:
            self.put("sequence_packing", True, self.given.key("use_sequence_packing"))
        elif "sequence_packing_args" in self.given:
            self.t.has_no_effect(packing.path, "only with use_sequence_packing: True")
        switch, name = f"use_dynamic_batching_in_{suffix}", f"max_tokens_per_microbatch_in_{suffix}"
        tokens = self.given.get(name, int)
        if not self.given.get(switch, bool, False):
            if name in self.given:
                self.t.has_no_effect(self.given.key(name), f"only with {switch}: True")
        elif not tokens:
            self.t.report(self.given.key(switch), f"needs {name}")
        elif is_packed and packing.get(packed, int):
            self.t.has_no_effect(self.given.key(name), f"with packed rows {packed} counts")
        else:
            self.put("max_tokens_per_micro_batch", tokens, self.given.key(name))
        if is_packed and packing.get(packed, int):
            self.put("max_tokens_per_micro_batch", packing.values[packed], packing.key(packed))
        switch = f"use_dynamic_batching_in_{other}"
        if self.given.get(switch, bool, False):
            does = "trains, and scores as it trains" if in_train else "only scores"
            self.t.has_no_effect(self.given.key(switch), f"the role {does}")

    def spread_experts_over_replica(self) -> None:
        """Lower expert parallelism to what the ranks of one replica of a frozen model allow."""
        name = "expert_model_parallel_size"
        wanted, tp = self._size(name), self._size("tensor_model_parallel_size")
        etp = self.config.values.get("expert_tensor_parallel_size") or tp
        fitting = [ep for ep in range(1, wanted + 1) if wanted % ep == 0 and tp % (etp * ep) == 0]
        if wanted > 1 and max(fitting, default=1) != wanted:
            self.put(name, max(fitting, default=1), self.config.key(name))
            self.t.has_no_effect(
                self.config.key(name),
                "each replica of a model that is not trained holds all experts, on its tensor x "
                "pipeline parallel ranks",
            )

    def _size(self, name: str) -> int:
        value = self.config.values.get(name, 1)
        return value if type(value) is int and value > 0 else 1

    @property
    def data_parallel_size(self) -> int:
        """Of a role on megatron-core; 1 where the devices do not fit, which is reported later."""
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        # The last is refused, and what follows from that is not told, too.
        ranks = math.prod(map(self._size, (*names, "context_parallel_size")))
        return max(1, self.num_devices // ranks)

    # ---- trainers ---------------------------------------------------------------------------

    def trains(self, num_steps: int, max_grad_norm: Any) -> None:
        """Set optimizer, schedule, recomputation and adapters.

        Args:
            num_steps: optimizer steps of the job.
            max_grad_norm: gradients are scaled down to it.
        """
        self.t.put((*self.at, "trainable"), True, self.path)
        training = self.training_args
        training.copy(self.at)
        self.put("lr", training.get("learning_rate", float, 5e-5), training.key("learning_rate"))
        weight_decay = training.get("weight_decay", float, 0.0)
        self.put("weight_decay", weight_decay, training.key("weight_decay"))
        style = training.choose("lr_scheduler_type", _SCHEDULES, "linear")
        self.put("lr_decay_style", style, training.key("lr_scheduler_type"))
        warmup = training.get("warmup_steps", int, 0, least=0)
        ratio = training.get("warmup_ratio", float, 0.0, least=0)
        self.put(
            "lr_warmup_iters", warmup or math.ceil(ratio * num_steps),
            training.key("warmup_steps" if warmup else "warmup_ratio"),
            training.key("warmup_ratio" if warmup else "warmup_steps"),
        )  # fmt: skip
        self.put("clip_grad", max_grad_norm, ("max_grad_norm",))
        self._recomputes()
        self._adapters()

    def _recomputes(self) -> None:
        key = self.model_args.key("disable_gradient_checkpointing")
        if not self.model_args.get("disable_gradient_checkpointing", bool, False):
            return
        asked = [name for name in RECOMPUTE if name in self.config]
        if asked:
            self.t.report(key, f"contradicts {asked[0]} of its strategy_config; keep one of them")

    def _adapters(self) -> None:
        args = self.model_args
        if "lora_target" not in args:
            return
        value = args.values["lora_target"]
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        key = args.key("lora_target")
        if names in (["all"], ["all-linear"]):
            layers = ALL_LORA_LAYERS
        elif not isinstance(names, list) or any(name not in _LORA_LAYERS for name in names):
            self.t.report(key, f"must be all-linear, or some of: {', '.join(_LORA_LAYERS)}")
            return
        else:
            layers = tuple(dict.fromkeys(_LORA_LAYERS[name] for name in names))
        rank = args.get("lora_rank", int, 8, least=1)
        self.put("target_modules", list(layers), key)
        self.put("lora_r", rank, args.key("lora_rank"), key)
        self.put("lora_alpha", args.get("lora_alpha", float, 2 * rank), args.key("lora_alpha"), key)
        if "lora_dropout" in args:
            self.put("lora_dropout", args.values["lora_dropout"], args.key("lora_dropout"))

    # ---- generation -------------------------------------------------------------------------

    def samples(self, given: Given) -> None:
        """Set the sampling parameters of its `generating_args`, vLLM's own by their names."""
        self.put("temperature", temperature(given), *temperature_keys(given))
        self.put("top_p", given.get("top_p", float, 0.7), given.key("top_p"))
        self.put("top_k", given.get("top_k", int, 50), given.key("top_k"))
        self._stops(given)
        self._searches(given)
        for name, value in given.values.items():
            if name in keys.SAMPLING_SET_ELSEWHERE:
                rule = f"is set by {keys.SAMPLING_SET_ELSEWHERE[name]}; leave it out"
                self.t.report(given.key(name), rule)
            elif name == "logprobs" and value is None:
                rule = "must be 0 or more: the rollout's log-probabilities are trained with"
                self.t.report(given.key(name), rule)
            elif (
                name not in keys.GENERATING_ARGS
                and value is not None
                and (name not in given.unknown)
            ):
                self.put(name, value, given.key(name))

    def _searches(self, given: Given) -> None:
        """Set a reward's beam search; the responses of actor_infer cannot come from one."""
        num_beams = given.get("num_beams", int, 1, least=1)
        key = given.key("num_beams")
        if self.kind == "actor_infer":
            if num_beams > 1:
                rule = (
                    "must be 1: training takes the probability with which a response was sampled, "
                    "and a search samples none; for greedy responses set do_sample: False, for "
                    "beams in evaluation validation.generating_args.num_beams"
                )
                self.t.report(key, rule)
            return
        if num_beams > 1:
            self.put("use_beam_search", True, key)
            self.put("num_beams", num_beams, key)
        if "length_penalty" in given:
            inner = given.key("length_penalty")
            if num_beams > 1:
                self.put("length_penalty", given.values["length_penalty"], inner)
            else:
                self.t.has_no_effect(inner, ONLY_WITH_BEAMS)

    def _stops(self, given: Given) -> None:
        key = given.key("stop_strings")
        strings = given.get("stop_strings", list)
        if not strings:
            if "include_stop_str_in_output" in given:
                inner = given.key("include_stop_str_in_output")
                self.put("include_stop_str_in_output", given.values[inner[-1]], inner)
            return
        if not all(isinstance(text, str) and text and ";" not in text for text in strings):
            self.t.report(key, "must be a list of texts without a semicolon")
            return
        self.put("stop_token_list", ";".join(strings), key)
        included = given.get("include_stop_str_in_output", bool, True)
        self.put("include_stop_str_in_output", included, given.key("include_stop_str_in_output"))


def generating_args(translation: Translation, path: Key) -> Given:
    """The `generating_args` of a role or of the validation."""
    at = (*path, "generating_args")
    return Given(translation, at, keys.GENERATING_ARGS, sampling_fields())


def temperature(given: Given) -> float:
    """What logits are divided by; 0 where nothing is sampled."""
    if not given.get("do_sample", bool, True):
        return 0.0
    return given.get("temperature", float, 0.95, least=0)


def temperature_keys(given: Given) -> tuple[Key, ...]:
    """Where that was said."""
    named = given.key("temperature")
    return (given.key("do_sample"), named) if given.values.get("do_sample") is False else (named,)
