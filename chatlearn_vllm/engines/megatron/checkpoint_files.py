"""Which checkpoints in a directory are whole, and are their files as they were written?

Reads directories and small files only: no megatron-core, so the driver can ask, too.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from chatlearn_vllm.engines.megatron.files import read_json

MARKER = "chatlearn.json"
"""File of a checkpoint that is written last, and says what the others are."""
LATEST = "latest"
"""File beside the checkpoints: the name of the one that was saved last."""
FORMAT_VERSION = 2
"""Of that file: 2 records files and holds what an export needs; files of format 1 say no number."""
HF_FILES = "hf"
"""Directory inside a checkpoint with what a model in Hugging Face form has besides weights."""
MAX_CHECKSUM_BYTES = 4 * 2**20
"""Of smaller files the content is compared, of larger ones the size."""

_NAME = re.compile(r"iter_(\d{7,})")
_UNFINISHED = re.compile(r"\.(iter_\d{7,})\.(writing|replaced|removed)")


def checkpoint_name(iteration: int) -> str:
    """Name of the directory of one checkpoint."""
    return f"iter_{iteration:07d}"


def iterations(directory: Path) -> list[int]:
    """Checkpoints that were written to their end, oldest first; their files are not looked at."""
    found = (_NAME.fullmatch(path.parent.name) for path in directory.glob(f"iter_*/{MARKER}"))
    return sorted(int(match[1]) for match in found if match)


def describe_files(path: Path) -> dict[str, dict[str, int | None]]:
    """Size in bytes and, of small ones, CRC-32 of every file of a checkpoint, by relative name."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        file.relative_to(path).as_posix(): _describe(file) for file in files if file.name != MARKER
    }


def problems(path: Path) -> list[str]:
    """What is wrong with the files of a checkpoint; empty if it can be read."""
    try:
        about = read_json(path / MARKER)
    except ValueError as error:  # missing, or no JSON
        return [f"no complete checkpoint there ({error})"]
    if about.get("format_version", 1) > FORMAT_VERSION:
        return [f"{MARKER}: format_version={about['format_version']} is of a newer version"]
    found = []
    for name, expected in about.get("files", {}).items():  # format 1 has none
        if not (path / name).is_file():
            found.append(f"{name} is missing")
        elif (size := (path / name).stat().st_size) != expected["bytes"]:
            found.append(f"{name} has {size} bytes, {expected['bytes']} were written")
        elif expected["crc32"] not in (None, zlib.crc32((path / name).read_bytes())):
            found.append(f"{name} has other content than was written")
    return found


def check(path: Path) -> dict[str, Any]:
    """Make sure that a checkpoint's files are as they were written.

    Returns:
        What its marker says.

    Raises:
        ValueError: names the files that are not, and the checkpoints beside it that can be read.
    """
    found = problems(path)
    if found:
        others = [
            iteration
            for iteration in iterations(path.parent)
            if checkpoint_name(iteration) != path.name
            and not problems(path.parent / checkpoint_name(iteration))
        ]
        raise ValueError(f"{path}: {'; '.join(found)}. {remedy(path.parent, others)}")
    return read_json(path / MARKER)


def remedy(directory: Path, complete: Collection[int]) -> str:
    """What a user can do whose checkpoint cannot be read.

    Args:
        directory: where it is.
        complete: iterations that can be read.
    """
    if not complete:
        return (
            f"{directory} has no other complete checkpoint: restore the files, or set "
            "runtime.enable_resume_training: False to start anew"
        )
    return (
        f"Complete: {', '.join(map(str, sorted(complete)))}; "
        f"runtime.load_data_checkpoint_iteration: {max(complete)} goes on from there"
    )


def prune(directory: Path, *, keep: int, newest: int, protected: Collection[int]) -> list[int]:
    """Remove old checkpoints.

    Args:
        directory: of one model.
        keep: so many stay, `newest` and those before it.
        newest: the one that was just completed; later ones are left alone.
        protected: stay whatever their age.

    Returns:
        The iterations that were removed.
    """
    older = [iteration for iteration in iterations(directory) if iteration <= newest]
    removed = [iteration for iteration in older[:-keep] if iteration not in protected]
    for iteration in removed:
        # Under its own name it is whole or not there, also after a kill.
        path = directory / checkpoint_name(iteration)
        path.rename(path.with_name(f".{path.name}.removed"))
    remove_unfinished(directory)
    return removed


def remove_unfinished(directory: Path) -> None:
    """Clean up after a save or a removal that was killed."""
    for path in directory.glob(".iter_*"):
        match = _UNFINISHED.fullmatch(path.name)
        if match and match[2] == "replaced" and not (directory / match[1]).exists():
            path.rename(directory / match[1])
        elif match:
            shutil.rmtree(path)


def _describe(file: Path) -> dict[str, int | None]:
    size = file.stat().st_size
    checksum = zlib.crc32(file.read_bytes()) if size <= MAX_CHECKSUM_BYTES else None
    return {"bytes": size, "crc32": checksum}
