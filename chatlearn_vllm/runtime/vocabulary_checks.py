"""Has a policy a tokenizer, and do the models that read its token ids mean the same by them?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from chatlearn_vllm.config.model_files import OTHER_CONFIG, read_config_json, read_json_object
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.megatron_module import MegatronModule

_TOKENIZER_FILES = ("tokeniz*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Patterns of names, one of which every tokenizer of transformers or vLLM has, remote code too."""
_TOKENIZER_SETTINGS = "tokenizer_config.json"
"""Which is no tokenizer by itself."""


def check_tokenizer(policy: BaseModule) -> None:
    """Check that the directory of the policy's tokenizer has one.

    Raises:
        UserError: there is none in it; transformers would say so late, and without the key.
    """
    args = policy.model_args
    if args.tokenizer is None and args.load is None:
        return  # the module says what to set
    directory = Path(args.tokenizer or args.load)
    found = {path.name for pattern in _TOKENIZER_FILES for path in directory.glob(pattern)}
    if not found - {_TOKENIZER_SETTINGS}:
        key = "load" if args.tokenizer in (None, args.load) else "tokenizer"
        raise UserError(
            f"models.{policy.name}: {key}={directory} has no tokenizer (tokenizer.json, "
            "tokenizer.model, vocab.json, ...); put its files there, or name the directory that "
            "has them with the key tokenizer"
        )


def check_vocabularies(policy: BaseModule, others: Iterable[BaseModule]) -> None:
    """Check the models on megatron-core, which take the policy's tokens as they are.

    Tokenizers are compared where both models have a tokenizer.json: the sizes in config.json may
    then differ by padding. Else the sizes are compared, where both are known.

    Args:
        policy: whose tokens they are.
        others: of the same job; those on other engines are passed over.

    Raises:
        UserError: one has another vocabulary.
    """
    for reader in others:
        if not isinstance(reader, MegatronModule) or not reader.reads_policy_tokens:
            continue
        difference = _difference(policy, reader)
        if difference is not None:
            raise UserError(
                f"models.{reader.name} reads the token ids of models.{policy.name} and has another "
                f"vocabulary: {difference}; load a model with the vocabulary of "
                f"models.{policy.name}, make a reward model with another one an HFRewardModule, or "
                f"set reads_policy_tokens = False in {type(reader).__name__} if it tokenizes texts "
                "itself"
            )


def _difference(policy: BaseModule, reader: BaseModule) -> str | None:
    args, own = policy.model_args, reader.model_args
    sampled = _tokenizer_file(args.tokenizer or args.load)
    # What the weights of `load` were trained with; `tokenizer` counts where it says nothing.
    read = _tokenizer_file(own.load) or _tokenizer_file(own.tokenizer)
    if sampled is not None and read is not None:
        return _difference_of_tokenizers(sampled, read)
    if args.engine_args.keys() & OTHER_CONFIG:
        return None
    directory = own.load or own.tokenizer
    sizes = [read_config_json(one).get("vocab_size") for one in (args.load, directory)]
    if None in sizes or sizes[0] == sizes[1]:
        return None
    return (
        f"vocab_size is {sizes[0]} in {args.load}/config.json and {sizes[1]} in "
        f"{directory}/config.json"
    )


def _tokenizer_file(directory: str | None) -> Path | None:
    path = None if directory is None else Path(directory, "tokenizer.json")
    return path if path is not None and path.is_file() else None


def _difference_of_tokenizers(sampled: Path, read: Path) -> str | None:
    """Names a token that `sampled` has and `read` has not, or under another id.

    More tokens in `read` do no harm: the policy does not sample them.
    """
    if sampled.samefile(read) or sampled.read_bytes() == read.read_bytes():
        return None
    known, ids = _ids(read), _ids(sampled)
    different = {text: token_id for text, token_id in ids.items() if known.get(text) != token_id}
    if not different:
        return None
    text = min(different, key=different.__getitem__)
    where = f"token {known[text]}" if text in known else "none"
    return (
        f"of {len(ids)} tokens in {sampled} {len(different)} are others among the {len(known)} in "
        f"{read}; {text!r} is token {ids[text]} there and {where} here"
    )


def _ids(path: Path) -> dict[str, int]:
    content = read_json_object(path)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # of [text, score], as Unigram has it
        vocabulary = {text: token_id for token_id, (text, _) in enumerate(vocabulary)}
    added = content.get("added_tokens") or ()
    return vocabulary | {token["content"]: token["id"] for token in added}
