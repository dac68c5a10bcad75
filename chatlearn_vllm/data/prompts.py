"""Read prompts from a file, tokenise them, and decide which come next."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.data.batch import ADDED_KEYS, ROLLOUT_KEYS

ASSISTANT_TAG = "\n\nAssistant: "
"""Ends the prompt in records with `text` or `query`; ChatLearn's dialogue format."""

_SOURCE_KEYS = ("prompt", "query", "text")
_RESERVED_KEYS = frozenset((*ROLLOUT_KEYS, *ADDED_KEYS, "input_ids"))
_MAX_REPORTED_PROBLEMS = 10


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    bos_token_id: int | None

    def encode(self, text: str) -> list[int]: ...


def load_prompts(
    path: str | Path | Sequence[str | Path], limit: int = -1, prompt_key: str = "prompt"
) -> list[dict[str, Any]]:
    """Read jsonl files: one JSON object per line, blank lines are skipped.

    The prompt is taken from the first of these keys that the object has:

    * `prompt`, or what `prompt_key` names: used as it is;
    * `query`: becomes "\\n\\nHuman: {query}\\n\\nAssistant: ";
    * `text`: a dialogue; cut behind its last "\\n\\nAssistant: ", what follows is left out.

    All other fields are kept. A field that only some records have is None in the others, so that
    every batch made of them has the same keys.

    Args:
        path: one file, or several that are read one after another.
        limit: keep only the first so many records; -1 keeps all.
        prompt_key: another name than "prompt", of a field that stays beside it.

    Returns:
        Records with the field "prompt" first, in the order of the file.

    Raises:
        UserError: no file is named; or names file, line number, key and rule of the first ten
            problems.
    """
    if not path:
        raise UserError(
            f"no file to load prompts from, only {path!r}; set runtime.data_path, and "
            "runtime.eval_data_path for evaluation"
        )
    paths = [path] if isinstance(path, str | Path) else path
    records = [record for one in paths for record in _read_file(Path(one), prompt_key)]
    fields = {field: None for record in records for field in record}
    chosen = records if limit < 0 else records[:limit]
    return [{**fields, **record} for record in chosen]


def require_records(prompts: Any) -> None:
    """Check that records were given, not the name of their file.

    Raises:
        UserError: it is the name: each of its letters would be a prompt.
    """
    if isinstance(prompts, str | Path):
        raise UserError(
            f"set_dataset({str(prompts)!r}) takes prompts; load them first: "
            f"set_dataset(load_prompts({str(prompts)!r}))"
        )


def require_dataset(dataset: Any, hook: str, num_records: int) -> None:
    """Check what a policy's `build_dataset` returned.

    Args:
        dataset: that it returned.
        hook: how it was called, for the message.
        num_records: that it got.

    Raises:
        ValueError: it has no prompts, or is no sequence with a `collate_fn`.
    """
    if dataset is None or (hasattr(dataset, "__len__") and len(dataset) == 0):
        raise ValueError(f"{hook} returned no prompts for {num_records} records")
    needed = ("__len__", "__getitem__", "collate_fn")
    missing = [name for name in needed if not hasattr(dataset, name)]
    if missing:
        raise ValueError(
            f"{hook} returned {type(dataset).__name__}, which has no {', '.join(missing)}; it must "
            "return a sequence of dicts with a method `collate_fn` that makes a list of them a "
            "batch, such as VLLMPromptPipeline; see docs/vllm_module.md"
        )


def require_prompt(row: int, text: Any, ids: Any, room: int, seq_length: int) -> None:
    """Check a prompt that a policy's `_add_request` adds.

    Args:
        row: its place among those that are added together.
        text: of the prompt.
        ids: its tokens.
        room: for a response, in tokens.
        seq_length: of prompt and response.

    Raises:
        ValueError: text and tokens are something else, or there is no room.
    """
    if not isinstance(text, str | None) or isinstance(ids, str):
        raise ValueError(
            f"prompt {row}: _add_request_internal(texts, token_ids) got the text {text!r:.80} and "
            f"the tokens {ids!r:.80}; a text and its token ids are needed, in this order"
        )
    if room < 1:
        raise ValueError(
            f"prompt {row} has {len(ids)} tokens: no room for a response in "
            f"seq_length={seq_length}; truncate it in build_dataset()"
        )


def _read_file(path: Path, prompt_key: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"prompt file {path} does not exist")
    records, problems = [], []
    for place, line in _numbered_lines(path):
        try:
            records.append(_read_record(line, prompt_key))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        shown = problems[:_MAX_REPORTED_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise UserError("\n".join(shown))
    if not records:
        raise UserError(f"prompt file {path} holds no record")
    return records


def prompt_token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a prompt, with what the tokenizer adds to it where that belongs there.

    A text from a chat template begins with a BOS already, of which one is enough; and an EOS that
    is added behind a prompt would have the model go on behind the end.
    """
    ids = list(tokenizer.encode(text))
    bos, eos = (getattr(tokenizer, name, None) for name in ("bos_token", "eos_token"))
    if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    end = [getattr(tokenizer, "eos_token_id", None)] * (2 if eos and text.endswith(eos) else 1)
    return ids[:-1] if eos and len(ids) > 1 and ids[-len(end) :] == end else ids


def keep_tail(ids: list[int], max_length: int, bos_token_id: int | None) -> list[int]:
    """Cut tokens off the head of a prompt that is too long; a leading BOS stays.

    The end of a prompt holds what is asked.
    """
    if len(ids) <= max_length:
        return ids
    head = ids[:1] if ids[0] == bos_token_id and max_length > 1 else []
    return head + ids[len(ids) - (max_length - len(head)) :]


class PromptPipeline:
    """A data set of tokenised prompts; the base of user-written pipelines.

    Items are dicts with at least `input_ids` (list of token ids) and `prompt` (str). A subclass
    may skip this constructor and assign `data` or `prompts_ids`, which are the same list, itself.
    """

    num_cut = 0
    """Prompts that were too long and lost tokens at their head."""

    def __init__(
        self, prompts: Sequence[Any], max_prompt_length: int, tokenizer: Tokenizer | None = None
    ) -> None:
        """Tokenise plain prompts; see `VLLMPromptPipeline`, of which this is the simple case."""
        self.tokenizer = tokenizer
        self.data, self.num_cut = _tokenize(
            prompts, max_prompt_length, tokenizer, prompt_key="prompt"
        )

    @property
    def data(self) -> list[dict[str, Any]]:
        """The items."""
        return self.prompts_ids

    @data.setter
    def data(self, items: list[dict[str, Any]]) -> None:
        self.prompts_ids = items

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[index]

    def collate_fn(self, items: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Turn items into one dict of lists, unpadded.

        Raises:
            ValueError: the items' keys differ.
        """
        return record_columns(items)


def record_columns(
    records: Sequence[dict[str, Any]], but: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """The fields of records, all but some, as a list each.

    Raises:
        ValueError: a record has other fields than the first.
    """
    first = records[0] if records else {}
    for record in records:
        if record.keys() != first.keys():
            differing = sorted(record.keys() ^ first.keys())
            raise ValueError(f"prompt records of one batch differ in fields {differing}")
    return {key: [record[key] for record in records] for key in first if key not in but}


class VLLMPromptPipeline(PromptPipeline):
    """A data set of prompts for `VLLMModule.build_dataset`."""

    def __init__(
        self,
        prompts: Sequence[str] | Sequence[tuple] | Sequence[dict[str, Any]],
        max_prompt_length: int,
        tokenizer: Tokenizer | None = None,
        prompt_key: str | None = None,
    ) -> None:
        """Tokenise the prompts.

        A prompt longer than `max_prompt_length` tokens loses tokens at its head, because its end
        holds what the model has to answer; a leading BOS stays.

        Args:
            prompts: texts; or tuples whose first entry is the text; or dicts, whose other fields
                stay in the item.
            max_prompt_length: in tokens, at least 1; `seq_length - max_new_tokens` as a rule.
            tokenizer: adds a BOS if its own settings say so.
            prompt_key: field of the text in dicts; None means "prompt". Items hold the text
                under "prompt" in any case.

        Raises:
            ValueError: names the row and key of the first prompt that is missing or empty.
        """
        self.tokenizer = tokenizer
        self.data, self.num_cut = _tokenize(
            prompts,
            max_prompt_length,
            tokenizer,
            prompt_key="prompt" if prompt_key is None else prompt_key,
        )


class PromptSampler:
    """An endless order of prompt rows, the same for the same seed, whose position can be saved.

    Every epoch holds each row once. A call of `next` may cross the end of an epoch, so a row can
    come twice in one call.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool = True) -> None:
        """Start before the first row.

        Args:
            num_prompts: rows of the data set.
            seed: decides the order of every epoch; unused without `shuffle`.
            shuffle: a new order in every epoch; else rows come in ascending order.
        """
        if num_prompts < 1:
            raise ValueError(f"num_prompts={num_prompts} must be at least 1")
        self._num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle
        self._move_to(epoch=0, position=0)

    def next(self, num_rows: int) -> list[int]:
        """Return the next `num_rows` rows and move behind them."""
        rows: list[int] = []
        while len(rows) < num_rows:
            taken = self._order[self._position :][: num_rows - len(rows)]
            rows += taken
            self._position += len(taken)
            if self._position == self._num_prompts:
                self._move_to(epoch=self._epoch + 1, position=0)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it depends on, as plain values."""
        return {
            "num_prompts": self._num_prompts,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            ValueError: the saved sampler had other prompts, another seed or another order.
        """
        check_prompt_order(
            state, num_prompts=self._num_prompts, seed=self._seed, shuffle=self._shuffle
        )
        self._move_to(epoch=state["epoch"], position=state["position"])

    def _move_to(self, *, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._order = list(range(self._num_prompts))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)


def check_prompt_order(state: Mapping[str, Any], **own: Any) -> None:
    """Check that a saved position is one in the order of prompts of today's job.

    Args:
        state: of `PromptSampler.state_dict`.
        own: what is known of today's: `num_prompts`, `seed`, `shuffle`.

    Raises:
        ValueError: they differ.
    """
    for key, value in own.items():
        if state[key] != value:
            raise ValueError(
                f"cannot resume the prompt order: {key} was {state[key]} when it was saved and is "
                f"{value} now; restore the old value or start a new run"
            )


def _numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line


def _read_record(line: str, prompt_key: str) -> dict[str, Any]:
    """Parse one line; ValueError says what is wrong without naming the place."""
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}, must be an object")
    reserved = sorted(_RESERVED_KEYS & record.keys())
    if reserved:
        raise ValueError(f"keys {reserved} are used by the framework; rename them")
    sources = dict.fromkeys((prompt_key, *_SOURCE_KEYS))
    source = next((key for key in sources if key in record), None)
    if source is None:
        raise ValueError(f"has keys {sorted(record)}, needs one of {list(sources)}")
    text = record[source] if source not in _SOURCE_KEYS else record.pop(source)
    if not isinstance(text, str) or not text:
        raise ValueError(f"key {source!r} is {text!r}, must be a non-empty string")
    others = {key: value for key, value in record.items() if key != "prompt"}
    return {"prompt": _format_prompt(source, text), **others}


def _format_prompt(source: str, text: str) -> str:
    if source == "query":
        return f"\n\nHuman: {text}{ASSISTANT_TAG}"
    if source == "text":
        dialogue, tag, _ = text.rpartition(ASSISTANT_TAG)
        if not tag:
            raise ValueError(
                f"key 'text' lacks {ASSISTANT_TAG!r}, which ends the prompt; "
                "use the key 'prompt' for a prompt without it"
            )
        return dialogue + tag
    return text


def _tokenize(
    prompts: Sequence[Any],
    max_prompt_length: int,
    tokenizer: Tokenizer | None,
    *,
    prompt_key: str,
) -> tuple[list[dict[str, Any]], int]:
    """The items, and how many prompts were cut."""
    if max_prompt_length < 1:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} must be at least 1; "
            "seq_length must exceed max_new_tokens"
        )
    if tokenizer is None:
        raise ValueError("a prompt pipeline needs a tokenizer; pass self.tokenizer.tokenizer")
    items, num_cut = [], 0
    for row, entry in enumerate(prompts):
        text, fields = _text_and_fields(entry, prompt_key)
        if not isinstance(text, str) or not text:
            raise ValueError(
                f"prompts[{row}] (key {prompt_key!r}) is {text!r}, must be a non-empty string"
            )
        whole = prompt_token_ids(text, tokenizer)
        num_cut += len(whole) > max_prompt_length
        input_ids = keep_tail(whole, max_prompt_length, tokenizer.bos_token_id)
        items.append({**fields, "input_ids": input_ids, "prompt": text})
    return items, num_cut


def _text_and_fields(entry: Any, prompt_key: str) -> tuple[Any, dict[str, Any]]:
    if isinstance(entry, dict):
        return entry.get(prompt_key), entry
    if isinstance(entry, tuple | list):
        return (entry[0] if entry else None), {}
    return entry, {}
