"""What do the JSON files in a model's directory say?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatlearn_vllm.config.problems import ConfigError, Problem


def read_config_json(load: str | None) -> dict[str, Any]:
    """The config.json in a checkpoint's directory; empty without the file.

    Raises:
        ConfigError: the file holds something else than a JSON object.
    """
    return {} if load is None else read_json_object(Path(load, "config.json"))


def read_json_object(path: Path) -> dict[str, Any]:
    """What a file holds; empty without the file.

    Raises:
        ConfigError: that is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text's encoding, too
        why = f": {error}"
    else:
        if isinstance(content, dict):
            return content
        why = ""
    rule = f"must hold a JSON object{why}; copy the file from where the model came from"
    raise ConfigError([Problem(str(path), "", rule)])
