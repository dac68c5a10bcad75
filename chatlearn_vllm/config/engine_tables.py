"""How does the table of what engines can do get into docs/engines.md?

    python -m chatlearn_vllm.config.engine_tables docs/engines.md

writes it anew between the file's two markers.
"""

import sys
from pathlib import Path

from chatlearn_vllm.config.engine_support import FEATURES, NOT_TOGETHER, YES

BEGIN = "<!-- tables: begin, written by `python -m chatlearn_vllm.config.engine_tables` -->"
END = "<!-- tables: end -->"


def tables() -> str:
    """All of it in Markdown."""
    lines = [
        "| asked for | key | `vllm` | `vllm` on CPU | `transformers` | `server` "
        "| `server` that the job starts |",
        "|---|---|---|---|---|---|---|",
    ]
    for feature in FEATURES.values():
        key = feature.key.lstrip(":")
        cells = (
            feature.vllm, feature.cpu, feature.transformers, feature.server, feature.started_server
        )  # fmt: skip
        shown = " | ".join(_cell(text, key) for text in cells)
        lines.append(f"| {feature.title} | `{key}` | {shown} |")
    lines += [
        "",
        "Not together, in the engine `vllm`:",
        "",
        "| | with | because |",
        "|---|---|---|",
    ]
    for clash in NOT_TOGETHER:
        these = "; ".join(FEATURES[name].title for name in clash.these)
        lines.append(f"| {these} | {FEATURES[clash.other].title} | {clash.why} |")
    return "\n".join((*lines, ""))


def _cell(verdict: str, key: str) -> str:
    return verdict if verdict.startswith(YES) else f"no: {verdict.format(key=key)}"


def with_tables(document: str) -> str:
    """The document with its tables written anew."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
