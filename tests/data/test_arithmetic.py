"""Are the demo's problems right, unseen where they must be, and scored as documented?"""

from itertools import combinations
from pathlib import Path

import pytest

from chatlearn_vllm.data.prompts import load_prompts
from examples.megatron.data import make_arithmetic
from examples.megatron.data.arithmetic import score

DATA_DIR = Path(make_arithmetic.__file__).parent


def load(name: str) -> list[dict]:
    return load_prompts(DATA_DIR / f"arithmetic_{name}.jsonl")


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("75", 1.0),
        (" 75 ", 1.0),
        ("75\n12+13=25", 1.0),
        ("\n75", 0.0),
        ("", 0.0),
        ("7", 0.0),
        ("755", 0.0),
        ("075", 0.0),
        ("+75", 0.0),
        ("75.", 0.0),
        ("7 5", 0.0),
        ("27+48=75", 0.0),
    ],
)
def test_only_the_right_number_alone_is_rewarded(response, reward):
    assert score(response, "75") == reward


@pytest.mark.parametrize("name", ["sft", "train", "eval"])
def test_every_answer_is_the_sum(name):
    for record in load(name):
        first, second = record["prompt"].removesuffix("=").split("+")
        assert int(record["answer"]) == int(first) + int(second)
        assert score(record.get("response", record["answer"]), record["answer"]) == 1.0


def test_no_problem_is_in_two_files_not_even_the_other_way_round():
    pairs = {}
    for name in make_arithmetic.NUM_PAIRS:
        problems = [record["prompt"].removesuffix("=") for record in load(name)]
        assert len(set(problems)) == len(problems)
        pairs[name] = {frozenset(problem.split("+")) for problem in problems}
    for one, other in combinations(pairs.values(), 2):
        assert not one & other


@pytest.mark.parametrize("name", ["reward", "reward_eval"])
def test_of_a_pair_one_response_is_right_and_the_other_a_digit_off(name):
    for record in load(name):
        first, second = record["prompt"].removesuffix("=").split("+")
        assert record["chosen"] == str(int(first) + int(second))
        assert str(int(record["rejected"])) == record["rejected"]
        digits = zip(record["chosen"], record["rejected"], strict=True)
        assert sum(right != wrong for right, wrong in digits) == 1


def test_the_script_makes_the_files_that_are_kept():
    for name, records in make_arithmetic.make_records().items():
        assert load(name) == records


def test_the_files_stay_small():
    assert sum(path.stat().st_size for path in DATA_DIR.glob("*.jsonl")) < 400_000
