"""Which pairs of a better and a worse response do the records of a file hold?"""

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

_MAX_REPORTED_PROBLEMS = 10


def preference_pairs(records: Sequence[Any]) -> list[dict[str, str]]:
    """Make every record into pairs.

    A record is a dict with `prompt` (see `load_prompts`) and

    * `chosen`, or ChatLearn's `response`, and `rejected`: one pair;
    * `response` and `score`, two lists of one length, as ChatLearn's reward data: each response is
      paired with each that has a lower score.

    Args:
        records: as `load_prompts` returns them, or pairs that this function made.

    Returns:
        Dicts of `prompt`, `chosen` and `rejected`, in the order of the records.

    Raises:
        ValueError: names number, key and rule of the first ten bad records.
    """
    pairs: list[dict[str, str]] = []
    problems: list[str] = []
    for number, record in enumerate(records):
        try:
            pairs += _pairs_of_record(record)
        except ValueError as error:
            problems.append(f"records[{number}]: {error}")
    if problems:
        shown = problems[:_MAX_REPORTED_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise ValueError("\n".join(shown))
    return pairs


def _pairs_of_record(record: Any) -> Iterator[dict[str, str]]:
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, must be a dict with prompt and responses")
    prompt = _text(record, "prompt")
    if record.get("score") is not None:
        responses = _scored_responses(record)
    else:
        better = "chosen" if record.get("chosen") is not None else "response"
        responses = [(1, _text(record, better)), (0, _text(record, "rejected"))]
    return (
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for (score, chosen), (lower_score, rejected) in permutations(responses, 2)
        if score > lower_score
    )


def _scored_responses(record: dict[str, Any]) -> list[tuple[float, str]]:
    responses, scores = record.get("response"), record["score"]
    if not isinstance(responses, list) or not isinstance(scores, list):
        raise ValueError("keys 'response' and 'score' must both be lists")
    if len(responses) != len(scores):
        raise ValueError(
            f"key 'response' has {len(responses)} entries and 'score' {len(scores)}; each response "
            "needs one score"
        )
    if not all(isinstance(text, str) and text for text in responses):
        raise ValueError("key 'response' must hold non-empty strings only")
    if not all(isinstance(score, int | float) for score in scores):
        raise ValueError(f"key 'score' is {scores!r}, must hold numbers only")
    return list(zip(scores, responses, strict=True))


def _text(record: dict[str, Any], key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not text:
        needed = "a pair needs prompt, chosen (or response) and rejected"
        raise ValueError(f"key {key!r} is {text!r}, must be a non-empty string; {needed}")
    return text
