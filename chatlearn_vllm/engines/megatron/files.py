"""How does a directory appear whole or not at all, when several ranks write into it?"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a fresh directory beside `path` that becomes `path` when the block ends.

    Collective over all ranks, which must share the file system; a process without a process group
    is alone. If the block raises, `path` is left as it was.
    """
    temporary = begin_directory(path)
    try:
        yield temporary
    except BaseException:
        if world_size() == 1:  # else other ranks may still be writing
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    commit_directory(path)


def begin_directory(path: Path) -> Path:
    """Make the directory that `commit_directory` renames to `path`. Collective."""
    temporary = _unfinished(path)
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    return temporary


def commit_directory(path: Path) -> None:
    """Put what was written since `begin_directory` in the place of `path`. Collective."""
    barrier()  # every rank has written its part
    if rank() == 0:
        replaced = path.with_name(f".{path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)
        _unfinished(path).rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    barrier()  # no rank goes on before the directory is there


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a small file; a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file.

    Raises:
        ValueError: there is no such file, or it is not JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
