"""Which keys did the user give, in the job's file, in model files and on the command line?"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from chatlearn_vllm.config.problems import Key, Problem
from chatlearn_vllm.config.scalars import typed
from chatlearn_vllm.config.strategies import is_strategy_file, read_strategies
from chatlearn_vllm.config.tree import Tree, TreeReader

COMMAND_LINE = "command line"
"""The origin of overrides."""

_LEGACY_JOB_KEYS = {"rlhf": "runtime"}
_LEGACY_MODEL_KEYS = {
    "num_device": "num_gpu",
    "moe_expert_model_parallel_size": "expert_model_parallel_size",
}
LEGACY_MODEL_FILE_KEYS = {
    "vllm_load_format": "load_format",
    "num_generations": "num_inference_per_prompt",
    "max_completion_length": "max_new_tokens",
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
    "moe_expert_model_parallel_size": "expert_model_parallel_size",
}
"""Older names of keys of a model's file, or other frameworks', and ours."""


class Gathering:
    """Collects the keys of a whole job into one tree, and what is wrong with the files."""

    def __init__(self, main_file: Path) -> None:
        self.problems: list[Problem] = []
        self.notices: list[str] = []
        self._main_file = main_file
        self._reader = TreeReader(main_file.parent, self.problems, self.notices)

    def gather(self, overrides: Sequence[str]) -> Tree:
        """The job with each model's file below `model_args`; overrides win over all files."""
        loaded = self._reader.load(self._main_file)
        if isinstance(loaded, dict) and is_strategy_file(loaded):
            return read_strategies(
                self._main_file, loaded, self._read_strategy_overrides(overrides),
                self._reader.load, self.problems, self.notices,
            )  # fmt: skip
        tree = self._reader.resolve(self._main_file, loaded)
        self._rename_legacy_keys(tree)
        tree.merge(self._read_overrides(overrides, _models_in(tree)))
        whole = Tree()
        for name in _models_in(tree):
            whole.merge(self._read_model_file(tree, name), ("models", name, "model_args"))
        whole.merge(tree)
        # A file that several models include was read for each of them.
        self.notices[:] = [*dict.fromkeys(self.notices), *self._left_out()]
        return whole

    @property
    def unset(self) -> dict[str, str]:
        """Dotted keys that are left out, with the environment variable that is not set."""
        return {dotted: name for (_, dotted), name in self._reader.unset.items()}

    def _left_out(self) -> Iterator[str]:
        by_file: dict[str, dict[str, str]] = {}
        for (file, dotted), name in self._reader.unset.items():
            by_file.setdefault(file, {})[dotted] = name
        for file, variables in by_file.items():
            keys = ", ".join(f"{dotted}=${{{name}}}" for dotted, name in variables.items())
            yield f"{file}: left out, as the environment variables are not set: {keys}"

    def _read_strategy_overrides(self, overrides: Sequence[str]) -> Tree:
        """Overrides of a strategy file; Hydra's + and ++ before a name are taken."""
        tree = Tree()
        for override in overrides:
            self._merge_override(tree, override.lstrip("+"), "max_steps=3")
        return tree

    def _merge_override(self, tree: Tree, override: str, example: str) -> None:
        dotted, equals, text = override.partition("=")
        names = dotted.split(".")
        if not equals or not all(names):
            self.problems.append(Problem(COMMAND_LINE, override, f"must look like {example}"))
            return
        value = typed(text)
        for name in reversed(names):
            value = {name: value}
        tree.merge(Tree.of(value, COMMAND_LINE))

    def _read_overrides(self, overrides: Sequence[str], models: Collection[str]) -> Tree:
        """`a.b.c=value` arguments as a tree; they cannot add to the models of the file."""
        tree = Tree()
        for override in overrides:
            dotted, equals, text = override.partition("=")
            names = dotted.split(".")
            is_model = names[0] == "models" and equals and all(names)
            if is_model and names[1:2] not in [[model] for model in models]:
                rule = f"the job has no such model, only {', '.join(models)}"
                self.problems.append(Problem(COMMAND_LINE, dotted, rule, text))
            else:
                self._merge_override(tree, override, "runtime.num_episode=3")
        self._rename_legacy_keys(tree)
        return tree

    def _read_model_file(self, tree: Tree, model: str) -> Tree:
        key = ("models", model, "model_config_file")
        name = tree.get(key)
        if not isinstance(name, str):
            return Tree()
        file, dotted = tree.origin(key)
        naming_file = self._main_file if file == COMMAND_LINE else Path(file)
        path = self._reader.find(naming_file.parent, name)
        if path is None:
            self.problems.append(Problem(file, dotted, "no such file", name))
            return Tree()
        model_tree = self._reader.read(path)
        self._rename(model_tree, (), LEGACY_MODEL_FILE_KEYS)
        return model_tree

    def _rename_legacy_keys(self, tree: Tree) -> None:
        """Give keys of older ChatLearn files their present names."""
        self._rename(tree, (), _LEGACY_JOB_KEYS)
        for name in _models_in(tree):
            self._rename(tree, ("models", name), _LEGACY_MODEL_KEYS)
            self._rename(tree, ("models", name, "model_args"), LEGACY_MODEL_FILE_KEYS)

    def _rename(self, tree: Tree, at: Key, new_names: dict[str, str]) -> None:
        values = tree.get(at)
        for old, new in new_names.items():
            if not isinstance(values, dict) or old not in values:
                continue
            file, dotted = tree.origin((*at, old))
            if new in values:
                rule = f"is the older name of {new}, which is given too; keep one of them"
                self.problems.append(Problem(file, dotted, rule, values.pop(old)))
            else:
                self.notices.append(f"{file}: {dotted} is now called {new}")
                tree.rename(at, old, new)


def _models_in(tree: Tree) -> dict[str, Any]:
    models = tree.get(("models",))
    return models if isinstance(models, dict) else {}
