"""Which files does the `defaults` list of a strategy file (Hydra's) bring in?

Entries are laid over each other in order; the file itself is laid where the list has `_self_`,
else on top. An entry is a file beside this one, `group/name` or `{group: name}` one in a directory,
whose keys then lie below `group`; `@_here_` and `@_global_` put them at the top, `@a.b` below a.b.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatlearn_vllm.config.problems import Key, Problem
from chatlearn_vllm.config.tree import Tree

Load = Callable[[Path], Any]
"""Reads a yaml file as it is, None where it cannot be read (which is reported)."""


def compose(
    path: Path,
    values: dict[str, Any],
    load: Load,
    problems: list[Problem],
    including: Sequence[Path] = (),
) -> tuple[Tree, list[str]]:
    """Lay a file over what its `defaults` name.

    Args:
        path: of the file.
        values: its keys, templates still in them.
        load: reads another file.
        problems: takes entries that are none.
        including: files whose `defaults` led to this one.

    Returns:
        All keys, and the entries of which there is no file.
    """
    own = Tree.of({name: value for name, value in values.items() if name != "defaults"}, str(path))
    entries = values.get("defaults") or []
    if not isinstance(entries, list):
        problems.append(Problem(str(path), "defaults", "must be a list of files", entries))
        entries = []
    if "_self_" not in entries:
        entries = [*entries, "_self_"]
    tree, missing = Tree(), []
    for entry in entries:
        if entry == "_self_":
            tree.merge(own)
            continue
        try:
            name, at = _file_and_place(entry)
        except ValueError as error:
            problems.append(Problem(str(path), "defaults", str(error), entry))
            continue
        file = next(
            (one for end in (".yaml", ".yml") if (one := path.parent / f"{name}{end}").is_file()),
            None,
        )
        chain = (*including, path.resolve())
        if file is None:
            missing.append(name)
        elif file.resolve() in chain:
            rule = "files name each other in a circle"
            problems.append(Problem(str(path), "defaults", rule, entry))
        elif isinstance(below := load(file), dict):
            inner, further = compose(file, below, load, problems, chain)
            tree.merge(inner, at)
            missing += further
    return tree, missing


def _file_and_place(entry: Any) -> tuple[str, Key]:
    """The name of a file without its ending, and the map that its keys belong to."""
    if isinstance(entry, dict) and len(entry) == 1:
        ((group, name),) = entry.items()
        group, _, package = str(group).removeprefix("override ").partition("@")
        name, group = f"{group.removeprefix('optional ')}/{name}", group
    elif isinstance(entry, str):
        name, _, package = entry.partition("@")
        group = name.rpartition("/")[0]
    else:
        raise ValueError("must be the name of a file, or {group: name}")
    if package in ("_here_", "_global_"):
        return name, ()
    place = package or "/".join(part for part in group.split("/") if part not in ("", ".", ".."))
    return name, tuple(part for part in place.replace("/", ".").split(".") if part)
