"""Where do results go, and can they be written there?"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from chatlearn_vllm.bench.cases import OptionError
from chatlearn_vllm.bench.report import ENGINES_PNG, GPUS_PNG, PAGE

RESULTS = "results.json"


def make_outputs(out: Path, copy: str | None) -> None:
    """Make the directories of all that will be written, and see that files can be.

    Args:
        out: directory of results.
        copy: of --json: a file that gets the results, too.

    Raises:
        OptionError: something cannot be written; before anything was measured.
    """
    problems = [
        f"--out={out}: {name} in it is a directory; name another directory, or move that"
        for name in (RESULTS, PAGE, ENGINES_PNG, GPUS_PNG)
        if (out / name).is_dir()
    ]
    if copy is not None and Path(copy).is_dir():
        problems.append(f"--json={copy}: is a directory; name a file in it")
    elif copy is not None and (error := _make(Path(copy).resolve().parent)):
        problems.append(f"--json={copy}: its directory {error}; name another file")
    # Last, so that no empty directory is left where something else is wrong.
    if not problems and (error := _make(out)):
        problems.append(f"--out={out}: {error}; name another directory")
    if problems:
        raise OptionError("\n".join(problems))


def save_results(results: dict[str, Any], out: Path, copy: str | None) -> None:
    """Write them, each file whole or not at all; the arguments are those of `make_outputs`."""
    text = json.dumps(results, indent=1)
    for path in (out / RESULTS, *([Path(copy).resolve()] if copy is not None else ())):
        beside = path.with_name(path.name + ".writing")
        beside.write_text(text)
        beside.replace(path)


def _make(directory: Path) -> str | None:
    """Make a directory and write a file into it; what went wrong."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    try:
        with tempfile.NamedTemporaryFile(dir=directory):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"
