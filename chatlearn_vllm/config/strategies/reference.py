"""How do the tables of keys become those of docs/strategies.md?

    python -m chatlearn_vllm.config.strategies.reference docs/strategies.md

writes the tables anew between the file's two markers.
"""

import sys
from pathlib import Path

from chatlearn_vllm.config.strategies import keys, strategy_keys

BEGIN = "<!-- tables: begin, written by `python -m chatlearn_vllm.config.strategies.reference` -->"
END = "<!-- tables: end -->"

_TABLES = {
    "The whole job": keys.TOP,
    "A role": keys.ROLE,
    "`sequence_packing_args`": keys.PACKING,
    "`strategy_args`": strategy_keys.STRATEGY,
    "`strategy_config` of vllm": strategy_keys.VLLM,
    "`strategy_config` of megatron_train and megatron_infer": strategy_keys.MEGATRON,
    "`model_args`": keys.MODEL_ARGS,
    "`training_args`": keys.TRAINING_ARGS,
    "`generating_args`": keys.GENERATING_ARGS,
    "`data_args`": keys.DATA_ARGS,
    "An entry of `rewards`, besides the keys of a role": {
        name: entry for name, entry in keys.REWARD.items() if entry != keys.ROLE.get(name)
    },
    "`validation`": keys.VALIDATION,
}
_FURTHER = {
    "`strategy_config` of vllm": "Any other field of vLLM's EngineArgs, and our keys of the "
    "scheduler, cache and engine ([configuration.md](configuration.md)), under their own names; "
    "with hf_infer in actor_infer ([transformers_engine.md](transformers_engine.md)) those of vLLM "
    "alone are refused where they would change responses, else told. "
    "Refused, because another key says it: ",
    "`strategy_config` of megatron_train and megatron_infer": "Our keys of parallelism and "
    "recomputation, and any field of megatron-core's TransformerConfig, under their own names.",
    "`generating_args`": "Any other field of vLLM's SamplingParams under its own name. Refused, "
    "because another key says it: ",
}
_SET_ELSEWHERE = {
    "`strategy_config` of vllm": strategy_keys.VLLM_SET_ELSEWHERE,
    "`generating_args`": keys.SAMPLING_SET_ELSEWHERE,
}


def tables() -> str:
    """All keys in Markdown."""
    return "\n".join(_table(title, table) for title, table in _TABLES.items())


def with_tables(document: str) -> str:
    """The document with its tables written anew."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


def _table(title: str, table: keys.Keys) -> str:
    lines = [f"### {title}", ""]
    if title in _FURTHER:
        elsewhere = _SET_ELSEWHERE.get(title, {})
        refused = ", ".join(f"`{name}` ({by})" for name, by in elsewhere.items())
        lines += [_FURTHER[title] + refused + "." * bool(refused), ""]
    lines += ["| key | ours | effect |", "|---|---|---|"]
    for name, entry in table.items():
        if isinstance(entry, keys.NoEffect):
            lines.append(f"| `{name}` | | none: {entry.why} |")
        else:
            ours = f"`{entry.ours}`" if entry.ours else ""
            lines.append(f"| `{name}` | {ours} | {entry.says} |")
    return "\n".join((*lines, ""))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
