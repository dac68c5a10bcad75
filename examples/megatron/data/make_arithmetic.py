"""Which problems does the demo learn from, and on which is it tested?

python examples/megatron/data/make_arithmetic.py     writes the files beside this script

Sums of two numbers with two digits each, "27+48=" with the answer "75", in disjoint files:

    arithmetic_sft.jsonl          prompt, answer, response: a few, for supervised fine-tuning
    arithmetic_train.jsonl        prompt, answer: more, for reinforcement learning
    arithmetic_eval.jsonl         prompt, answer: for evaluation only
    arithmetic_reward.jsonl       prompt, chosen, rejected: for a reward model
    arithmetic_reward_eval.jsonl  the same, for its evaluation

The chosen response is right, in the rejected one a digit is wrong.

A sum and its mirror image ("48+27=") are always in the same file or in none, so no problem of the
evaluation was seen the other way round.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path

NUM_PAIRS = {"eval": 200, "train": 2000, "sft": 500, "reward": 1200, "reward_eval": 150}
"""Unordered pairs of numbers per file; a pair of two different numbers makes two problems."""


def main() -> None:
    """Write the files."""
    for name, records in make_records().items():
        path = Path(__file__).with_name(f"arithmetic_{name}.jsonl")
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_records() -> dict[str, list[dict[str, str]]]:
    """Return the records of each file, by its name; the same ones on every call."""
    generator = random.Random(0)
    pairs = [(first, second) for first in range(10, 100) for second in range(first, 100)]
    generator.shuffle(pairs)
    files, start = {}, 0
    for name, num_pairs in NUM_PAIRS.items():
        problems = _both_orders(pairs[start : start + num_pairs])
        generator.shuffle(problems)
        files[name] = [_record(first, second) for first, second in problems]
        start += num_pairs
    files["sft"] = [{**record, "response": record["answer"]} for record in files["sft"]]
    for name in ("reward", "reward_eval"):
        files[name] = [_pair(record, generator) for record in files[name]]
    return files


def _both_orders(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [order for a, b in pairs for order in dict.fromkeys([(a, b), (b, a)])]


def _record(first: int, second: int) -> dict[str, str]:
    return {"prompt": f"{first}+{second}=", "answer": str(first + second)}


def _pair(record: dict[str, str], generator: random.Random) -> dict[str, str]:
    right = record["answer"]
    place = generator.randrange(len(right))
    # A number does not begin with 0.
    digits = [digit for digit in "0123456789"[place == 0 :] if digit != right[place]]
    wrong = right[:place] + generator.choice(digits) + right[place + 1 :]
    return {"prompt": record["prompt"], "chosen": right, "rejected": wrong}


if __name__ == "__main__":
    main()
