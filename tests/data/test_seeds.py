"""Does every response of a job have a seed of its own?"""

import hashlib

import pytest

from chatlearn_vllm.data.seeds import sample_seed


def test_no_two_samples_of_a_job_share_a_seed() -> None:
    seeds = {sample_seed(run, i, e) for run in (1, 2) for i in range(5000) for e in (True, False)}
    assert len(seeds) == 20000
    low_bits = {sample_seed(1, i, False) % 2**32 for i in range(5000)}
    assert len(low_bits) == 5000


@pytest.mark.parametrize(("is_eval", "name"), [(False, b"7/train"), (True, b"7/eval")])
def test_a_seed_is_the_same_in_every_version_and_one_more_for_the_next_sample(is_eval, name):
    start = int(hashlib.sha256(name).hexdigest()[:14], base=16)
    assert sample_seed(7, 0, is_eval) == start
    assert sample_seed(7, 123, is_eval) == start + 123
