"""Does every response of a job have a seed of its own?"""

from chatlearn_vllm.data.seeds import sample_seed


def test_no_two_samples_of_a_job_share_a_seed() -> None:
    seeds = {sample_seed(run, i, e) for run in (1, 2) for i in range(5000) for e in (True, False)}
    assert len(seeds) == 20000
    low_bits = {sample_seed(1, i, False) % 2**32 for i in range(5000)}
    assert len(low_bits) == 5000
