"""With which token are rows filled up, so that a saved model finds where each of them ends?"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chatlearn_vllm.engines.megatron.files import read_json

_SETTINGS, _TOKENS = "tokenizer_config.json", "tokenizer.json"
_TOLD_ALSO_IN = "special_tokens_map.json"
_NEW_TOKEN = "<|score_pad|>"
_MEANT_FOR_NOTHING = ("pad", "reserved", "unused", "unk")
"""Parts of the names of special tokens that no text ends with. Others may end a turn of a chat."""


class _Tokenizer(NamedTuple):
    """What the files of a tokenizer say."""

    settings: Mapping[str, Any]
    """tokenizer_config.json."""
    ids: Mapping[str, int]
    """By the text of a token, as far as the files list them."""
    special: frozenset[str]
    """Texts of special tokens."""
    next_id: int | None
    """The id that one more token gets; None where the files do not list all tokens."""

    def id_of(self, role: str) -> int | None:
        """The id of `pad_token`, `eos_token`, ..., if the tokenizer has one."""
        token = self.settings.get(role)
        return self.ids.get(token["content"] if isinstance(token, dict) else token)


def pad_token_id(hf_config: Mapping[str, Any], directories: Iterable[Path]) -> int | None:
    """A token to pad with that ends no text: none of the model's end-of-sequence tokens.

    In this order: the tokenizer's padding token, the model's, a special token whose name says that
    it is for nothing else, an id of the vocabulary that the tokenizer has no token for.

    Args:
        hf_config: of the model.
        directories: where tokenizer files may be; the last one that has some is taken.

    Returns:
        None where there is none of these.
    """
    directories = list(directories)
    tokenizer = _last_tokenizer(directories)
    ends = set(_ids(hf_config.get("eos_token_id")))
    for directory in directories:
        generation = directory / "generation_config.json"
        if generation.is_file():
            ends.update(_ids(read_json(generation).get("eos_token_id")))
    if tokenizer is not None:
        ends.add(tokenizer.id_of("eos_token"))
    # The model has an embedding for the token: rows that are padded with it go through it.
    num_tokens = hf_config.get("vocab_size", float("inf"))
    for candidate in _candidates(hf_config, tokenizer):
        if candidate is not None and candidate not in ends and 0 <= candidate < num_tokens:
            return candidate
    return None


def let_tokenizer_pad_with(directory: Path, token_id: int | None) -> None:
    """Change tokenizer files so that the tokenizer pads with a token, added where it has none.

    Does nothing where there is no tokenizer, or none that can have a token of this id.

    Args:
        directory: of a saved model; its files are replaced.
        token_id: what `pad_token_id` says.
    """
    tokenizer = _last_tokenizer([directory])
    if tokenizer is None or token_id is None or tokenizer.id_of("pad_token") == token_id:
        return
    texts = {number: text for text, number in tokenizer.ids.items()}
    if token_id == tokenizer.next_id:
        texts[token_id] = _NEW_TOKEN
        tokens = read_json(directory / _TOKENS)
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = {"id": token_id, "content": _NEW_TOKEN, **plain, "special": True}
        tokens["added_tokens"] = [*(tokens.get("added_tokens") or ()), added]
        _write(directory / _TOKENS, tokens)
    if token_id not in texts:
        return
    for name in (_SETTINGS, _TOLD_ALSO_IN):
        if (directory / name).is_file():
            _write(directory / name, read_json(directory / name) | {"pad_token": texts[token_id]})


def _candidates(hf_config: Mapping[str, Any], tokenizer: _Tokenizer | None) -> Iterator[int | None]:
    if tokenizer is not None:
        yield tokenizer.id_of("pad_token")
    yield hf_config.get("pad_token_id")
    if tokenizer is None:
        return
    yield tokenizer.id_of("unk_token")
    for text, token_id in tokenizer.ids.items():
        is_special = text in tokenizer.special
        if is_special and any(part in text.lower() for part in _MEANT_FOR_NOTHING):
            yield token_id
    yield tokenizer.next_id


def _last_tokenizer(directories: Iterable[Path]) -> _Tokenizer | None:
    with_one = [directory for directory in directories if (directory / _SETTINGS).is_file()]
    if not with_one:
        return None
    directory = with_one[-1]
    settings = read_json(directory / _SETTINGS)
    listed = settings.get("added_tokens_decoder") or {}
    added = [{"id": int(token_id), **token} for token_id, token in listed.items()]
    ids: dict[str, int] = {}
    has_all = (directory / _TOKENS).is_file()
    if has_all:
        tokens = read_json(directory / _TOKENS)
        added += tokens.get("added_tokens") or ()
        vocabulary = (tokens.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # of [text, score], as Unigram has it
            vocabulary = {text: token_id for token_id, (text, _) in enumerate(vocabulary)}
        ids |= vocabulary
    ids |= {token["content"]: token["id"] for token in added}
    return _Tokenizer(
        settings,
        ids,
        frozenset(token["content"] for token in added if token.get("special")),
        1 + max(ids.values(), default=-1) if has_all else None,
    )


def _ids(value: int | list[int] | None) -> list[int]:
    """What a configuration says under `eos_token_id`."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
