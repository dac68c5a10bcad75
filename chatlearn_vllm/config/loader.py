"""How does a yaml file become a checked JobConfig?

Gather what the user gave, put unknown keys aside, let the schema check types, derive what follows
from other keys, check the rules between keys. Every step collects what is wrong; one ConfigError at
the end tells all of it.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chatlearn_vllm.config.checks import check_job, notices
from chatlearn_vllm.config.derive import derive
from chatlearn_vllm.config.gather import LEGACY_MODEL_FILE_KEYS, Gathering
from chatlearn_vllm.config.model_args import ModelArgs
from chatlearn_vllm.config.problems import NO_VALUE, ConfigError, Key, Problem
from chatlearn_vllm.config.schema import JobConfig, ModelConfig, RuntimeConfig, RuntimeEnvConfig
from chatlearn_vllm.config.section import Section
from chatlearn_vllm.config.strategies import ROLES
from chatlearn_vllm.config.tree import BROKEN, Tree
from chatlearn_vllm.config.upstream_fields import (
    dropped_by_vllm,
    engine_choices,
    upstream_fields,
    upstream_scalars,
)

_SECTIONS: dict[str, type[Section]] = {"runtime_env": RuntimeEnvConfig, "runtime": RuntimeConfig}
_SET_BY_OUR_KEY = {
    "model": "load",
    "served_model_name": "load",
    "tensor_parallel_size": "tensor_model_parallel_size",
    "pipeline_parallel_size": "pipeline_model_parallel_size",
    "max_tokens": "max_new_tokens",
    "stop": "stop_token_list",
    "output_kind": "the runtime",
    "params_dtype": "dtype",
    "pipeline_dtype": "dtype",
    # Its gradients would be sums over the data parallel ranks, not averages.
    "calculate_per_token_loss": "loss_agg",
    "variable_seq_lengths": "max_tokens_per_micro_batch and sequence_packing",
    # Without it gradient norms leave out the shards of other tensor parallel ranks.
    "perform_initialization": "the runtime",
    "finalize_model_grads_func": "the runtime",
    "grad_scale_func": "the runtime",
    "grad_sync_func": "the runtime",
    "no_sync_func": "the runtime",
    "param_sync_func": "the runtime",
    "timers": "the runtime",
    "data_parallel_size": "num_gpu of the model",
    # Where ranks run, and how they find one another.
    **dict.fromkeys(
        (
            "distributed_executor_backend", "worker_cls", "nnodes", "node_rank", "master_addr",
            "master_port", "device_ids", "data_parallel_size_local", "data_parallel_rank",
            "data_parallel_start_rank", "data_parallel_address", "data_parallel_rpc_port",
            "data_parallel_backend", "data_parallel_hybrid_lb", "data_parallel_external_lb",
            "data_parallel_multi_port_external_lb",
        ),
        "the runtime",
    ),
    "spec_method": "speculative_config",
    "spec_model": "speculative_config",
    "spec_tokens": "speculative_config",
}  # fmt: skip
"""Upstream arguments that follow from one of our keys, so that no two keys mean the same."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = False
) -> JobConfig:
    """Read a job's yaml with its includes and model files, and check all of it.

    Args:
        path: the job's main yaml file.
        overrides: `"runtime.num_episode=3"`, `"models.policy.num_gpu=2"`,
            `"models.policy.model_args.temperature=0.7"`; they win over every file.
        check_files: also require that the entry script, data files and the directories of `load`
            and `tokenizer` exist.

    Raises:
        ConfigError: with everything that is wrong, one line each.
    """
    gathering = Gathering(Path(path))
    tree = gathering.gather(overrides)
    if gathering.problems and not tree.values:
        raise ConfigError(gathering.problems)
    validation = _Validation(tree, str(path), gathering.unset)
    given = validation.build()
    job = derive(given, tree)
    check_job(job, validation, check_files=check_files)
    if problems := [*gathering.problems, *validation.problems]:
        raise ConfigError(problems)
    told = (tree.in_users_words(notice) for notice in notices(job, given))
    return job.model_copy(update={"notices": (*gathering.notices, *told)})


class _Validation:
    """One tree against the schema; collects what is wrong with its values.

    Args:
        tree: all keys of the job.
        path: its main file, where a key is missed that nobody wrote.
        unset: dotted keys that were left out, with the environment variable that is not set.
    """

    def __init__(self, tree: Tree, path: str, unset: Mapping[str, str]) -> None:
        self.problems: list[Problem] = []
        self._tree = tree
        self._path = path
        self._unset = unset
        self._unreadable: set[Key] = set()

    def build(self) -> JobConfig:
        """The job without the values that were reported; those take their defaults."""
        values: dict[str, Any] = {"path": self._path, "models": {}}
        for name, value in self._tree.values.items():
            if name == "models":
                values["models"] = self._known_models(value)
            elif name in _SECTIONS:
                values[name] = self._known(_SECTIONS[name], value, (name,))
            else:
                self._report_unknown((name,), ["models", *_SECTIONS])
        while True:
            try:
                return JobConfig.model_validate(values)
            except ValidationError as error:
                rules: dict[Key, list[str]] = {}
                for item in error.errors():
                    rules.setdefault(_key_of(values, item["loc"]), []).append(_rule(item["msg"]))
                for key, alternatives in rules.items():
                    self._report_unreadable(key, " or ".join(alternatives))
                    _drop(values, key)

    def require(self, holds: bool, key: Key, rule: str, *, given: Sequence[Key] = ()) -> None:
        """Report a broken rule, unless a key it depends on has no valid value anyway."""
        if not holds and not any(self._is_unreadable(needed) for needed in (key, *given)):
            self._report(key, rule)

    def _is_unreadable(self, key: Key) -> bool:
        """Whether the value at a key, part of it, or the map it is in could not be used."""
        return any(
            key[: len(other)] == other or other[: len(key)] == key for other in self._unreadable
        )

    def _known_models(self, models: Any) -> dict[str, Any]:
        return {
            name: {"name": name} | self._known(ModelConfig, model, ("models", name))
            for name, model in self._as_map(models, ("models",)).items()
        }

    def _known(self, section: type[Section], values: Any, at: Key) -> dict[str, Any]:
        """The keys of a map that its section has; the rest is passed upstream or reported."""
        known: dict[str, Any] = {}
        keys = keys_of(section)
        for name, value in self._as_map(values, at).items():
            key = (*at, name)
            if value is BROKEN:
                self._unreadable.add(key)
                continue
            if section is ModelArgs and value == "None":
                value = None  # the text, as files for ChatLearn have it in quotes
            if name in keys:
                inner = keys[name]
                known[name] = self._known(inner, value, key) if inner else value
            elif section is ModelArgs and (targets := self._upstream_targets(key, value)):
                for target in targets:
                    known.setdefault(target, {})[name] = value
            elif key not in self._unreadable:
                self._report_unknown(key, keys)
        return {name: value for name, value in known.items() if (*at, name) not in self._unreadable}

    def _as_map(self, values: Any, at: Key) -> dict[str, Any]:
        """The map at a key; an empty one for nothing, and for what is no map."""
        if isinstance(values, dict):
            return values
        if values is BROKEN:
            self._unreadable.add(at)
        elif values is not None:
            self._report_unreadable(at, "must be a map of keys")
        return {}

    def _upstream_targets(self, key: Key, value: Any) -> list[str]:
        """The pass-through dicts that take a key of a model file, by the library that has it."""
        targets = [target for target, names in upstream_fields().items() if key[-1] in names]
        if targets and key[-1] in _SET_BY_OUR_KEY:
            self._report_unreadable(key, f"is set by {_SET_BY_OUR_KEY[key[-1]]}; leave it out")
            return []
        for target in targets:
            kind = upstream_scalars().get(target, {}).get(key[-1])
            if kind is not None and value is not None and not _is_kind(value, kind):
                self._report_unreadable(key, f"must be {_KINDS[kind]}")
                return []
        is_scalar = key[-1] in upstream_scalars().get("engine_args", {})  # spares reading vLLM
        has_choices = "engine_args" in targets and not is_scalar
        choices = engine_choices().get(key[-1]) if has_choices else None
        if choices and value is not None and _folded(key[-1], value) not in choices:
            nearest = difflib.get_close_matches(str(value), map(str, choices), n=1)
            rule = f"must be one of vLLM's: {', '.join(map(str, choices))}"
            self._report(key, rule, nearest[0] if nearest else None)
            self._unreadable.add(key)
            return []
        return targets

    def _report_unknown(self, key: Key, valid: Sequence[str] | Mapping[str, Any]) -> None:
        name = key[-1]
        candidates = set(valid)
        if "model_args" in key:
            candidates |= LEGACY_MODEL_FILE_KEYS.keys()
            candidates = candidates.union(*upstream_fields().values()) - _SET_BY_OUR_KEY.keys()
        homes = {
            "models.<name>": ModelConfig,
            **_SECTIONS,
            "the model's file or models.<name>.model_args": ModelArgs,
        }
        present = LEGACY_MODEL_FILE_KEYS.get(name, name)
        home = next(
            (title for title, section in homes.items() if present in keys_of(section)), None
        )
        rule = f"unknown key here; it belongs in {home}" if home else "unknown key"
        if len(key) == 1 and name in ROLES:
            rule = "a file describes models or roles, not both; docs/strategies.md"
            self._tree.written[key] = NO_VALUE  # a long map
        if gone := dropped_by_vllm(str(name)):
            self._report(key, f"unknown key: {gone}")
            return
        nearest = difflib.get_close_matches(str(name), sorted(candidates), n=1)
        self._report(key, rule, nearest[0] if nearest and not home else None)

    def _report_unreadable(self, key: Key, rule: str) -> None:
        """Report a value that cannot be used, so that no rule that needs it is checked."""
        self._report(key, rule)
        self._unreadable.add(key)

    def _report(self, key: Key, rule: str, suggestion: str | None = None) -> None:
        in_model_file = (*key[:2], "model_args", *key[2:])
        if key not in self._tree.origins and in_model_file in self._tree.origins:
            key = in_model_file  # sizes may stand in either place
        file, dotted = self._tree.origin(key)
        value = self._tree.given(key)
        rule = self._tree.in_users_words(rule)
        if variable := self._unset.get(dotted):
            rule += f"; environment variable {variable} is not set"
        self.problems.append(Problem(file or self._path, dotted, rule, value, suggestion))


def keys_of(section: type[Section]) -> dict[str, type[Section] | None]:
    """The keys that users may write in a section; its class for those that hold a section."""
    internal = {"name", *ModelArgs.PASS_THROUGH}
    return {
        field.alias or name: field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        else None
        for name, field in section.model_fields.items()
        if name not in internal
    }


def _folded(name: str, value: Any) -> Any:
    """A choice as vLLM reads it: backends may be written as on its command line."""
    is_backend = name.endswith("_backend") and isinstance(value, str)
    return value.lower().replace("-", "_") if is_backend else value


def _is_kind(value: Any, kind: type) -> bool:
    """Whether an upstream field takes a value; whole numbers are floats, too, 0 and 1 bools."""
    if isinstance(value, bool) or (kind is bool and value in (0, 1)):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


_KINDS = {bool: "a valid boolean", int: "a valid integer", float: "a valid number", str: "text"}


def _rule(message: str) -> str:
    """pydantic's message in the words of this project."""
    words = (
        ("Value error, ", ""), ("Input should", "must"), ("tuple", "list"), ("dictionary", "map")
    )  # fmt: skip
    for theirs, ours in words:
        message = message.replace(theirs, ours, 1)
    return message


def _key_of(values: dict[str, Any], location: Sequence[str | int]) -> Key:
    """The key pydantic complains about: `location` without parts of the value's type at its end."""
    key: Key = ()
    for name in location:
        if not isinstance(values, dict) or name not in values:
            break
        key, values = (*key, str(name)), values[name]
    return key


def _drop(values: dict[str, Any], key: Key) -> None:
    for name in key[:-1]:
        values = values[name]
    values.pop(key[-1], None)
