"""Strategy files: ROLL's way to describe a job by its roles, actor_infer, actor_train and so on.

Such a file becomes the same job description as one in our own dialect: its keys are read, templates
replaced, and each is given our name (`translate.py`) together with where it was written.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatlearn_vllm.config.problems import Problem
from chatlearn_vllm.config.strategies.composition import Load, compose
from chatlearn_vllm.config.strategies.interpolate import interpolate
from chatlearn_vllm.config.strategies.translate import translate
from chatlearn_vllm.config.tree import Tree

ROLES = ("actor_infer", "actor_train", "reference", "critic", "rewards")


def is_strategy_file(values: Mapping[str, Any]) -> bool:
    """Whether a job's yaml describes roles instead of models."""
    return "models" not in values and any(name in values for name in (*ROLES, "defaults"))


def read_strategies(
    path: Path,
    values: dict[str, Any],
    overrides: Tree,
    load: Load,
    problems: list[Problem],
    notices: list[str],
) -> Tree:
    """The job of a strategy file, in our keys.

    Args:
        path: of the file.
        values: what is in it.
        overrides: keys of the same dialect that win over it.
        load: reads a further file that its `defaults` name.
        problems: takes what is wrong.
        notices: takes what the user should know.
    """
    tree, missing = compose(path, values, load, problems)
    if missing:
        names = ", ".join(f"{name}.yaml" for name in missing)
        notices.append(f"{path}: not there, so nothing is taken from them: {names} (defaults)")
    tree.merge(overrides)
    interpolate(tree, os.environ, problems, missing)
    return translate(tree, path, problems, notices)
