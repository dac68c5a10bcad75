"""Do the ranks of a pipeline answer as one rank would, though only the last stage samples?"""

import gc
import re
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from chatlearn_vllm.engines.pipeline_stages import PipelineStages
from tests.helpers import rollout_ranks
from tests.helpers.ranks import RanksBySize
from tests.helpers.tiny_llama import save_tiny_llama

LONG = {"max_tokens": 80, "ignore_eos": True, "logprobs": 0}
GRAMMAR = {"ignore_eos": False, "structured_outputs": {"regex": "[0-9]{3}(ab|cd)"}}


@pytest.fixture(scope="module")
def ranks():
    """`ranks[n].run(function, ...)` runs a module-level function on n ranks."""
    by_size = RanksBySize(3)
    yield by_size
    by_size.close()


def exchange_steps(num_steps: int, late: set[int]) -> list[list[list[int]]]:
    """On a rank: the tokens of steps, two of them on their way at any time."""
    from vllm.v1.outputs import ModelRunnerOutput

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    group = SimpleNamespace(
        ranks=list(range(size)), cpu_group=dist.group.WORLD, is_last_rank=rank == size - 1,
        rank_in_group=rank,
    )  # fmt: skip
    stages, futures, results = PipelineStages(group, most_at_once=2), [], []
    try:
        assert stages.of_all(rank) == list(range(size))
        for step in range(num_steps):
            ids = [f"{row}-of-rank-{rank}" for row in range(3)]
            sampled = None  # what the earlier stages have is of no use
            if group.is_last_rank:
                batch = ids[::-1]  # workers have an order of their own
                rows = {name: row for row, name in enumerate(batch)}
                tokens = [[step] * (100 * step), [step + 1], [step + 2]]
                sampled = ModelRunnerOutput(
                    batch, rows, tokens, prompt_logprobs_dict={ids[1]: None}
                )
                if step in late:
                    sampled = Sampling(sampled)
            futures.append(stages.exchange(ids, sampled))
            if step:
                results.append(result_of(futures[step - 1]))
        results.append(result_of(futures[-1]))
        for one in results:
            assert one.req_ids == list(one.req_id_to_index) == ids[::-1]
            assert list(one.prompt_logprobs_dict) == [ids[1]]
        kept = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        messages = [one for one in kept if one.dtype == torch.uint8 and len(one) > 100]
        assert len(messages) == (2 if group.is_last_rank else 0)
        return [one.sampled_token_ids for one in results]
    finally:
        dist.barrier()
        dist.destroy_process_group()


class Sampling(Future):
    """What a GPU still works on: done when it is asked for."""

    def __init__(self, output):
        super().__init__()
        self._output = output

    def result(self, timeout=None):
        time.sleep(0.01)
        return self._output


def result_of(output):
    return output.result() if isinstance(output, Future) else output


@pytest.mark.parametrize("size", [2, 3])
def test_every_stage_gets_each_step_of_the_last_one_under_its_own_ids(ranks, size) -> None:
    for answer in ranks[size].run(exchange_steps, 20, late={3, 4, 9}):
        assert answer == [[[n] * (100 * n), [n + 1], [n + 2]] for n in range(20)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory, num_hidden_layers=3)
    return directory


def test_two_stages_answer_as_one_rank_does(ranks, checkpoint, tmp_path) -> None:
    prompts = [[5 + row, 6, 7 + row, 8] for row in range(12)]
    greedy = [(ids, LONG | {"temperature": 0.0}) for ids in prompts]
    drawn = [(ids, LONG | {"seed": row, "n": 2}) for row, ids in enumerate(prompts)]
    penalised = [(ids, LONG | {"temperature": 0.0, "repetition_penalty": 1.5}) for ids in prompts]
    # More sequences than run at once, of which those that run do not fit into the cache together.
    # One stage has twice the layers of the other.
    keys = {"load_format": "auto", "max_num_seqs": 8, "block_size": 32, "seed_per_response": True}
    keys["kv_cache_memory_bytes"] = 20 * 16384
    found = {}
    for stages in (1, 2):
        group = ranks[stages]
        group.run(rollout_ranks.build, tmp_path / str(stages), checkpoint, 1, stages, **keys)
        for kind in (greedy, drawn, penalised):
            first, *others = group.run(rollout_ranks.responses, kind)
            assert all(other == first for other in others)
            found.setdefault(stages, []).append(first)
        group.run(rollout_ranks.drop)
    for alone, together in zip(found[1], found[2], strict=True):
        for one, other in zip(sum(alone, []), sum(together, []), strict=True):
            assert one[0] == other[0] and one[3] == other[3] == "length"
            assert torch.tensor(one[1]) == pytest.approx(torch.tensor(other[1]), abs=1e-4)


def test_requests_after_an_error_of_a_hook_are_not_taken_for_those_before_it(
    ranks, checkpoint, tmp_path
) -> None:
    group = ranks[2]
    group.run(rollout_ranks.build, tmp_path / "job", checkpoint, 1, 2, load_format="auto")
    greedy = [([5 + row, 6, 7 + row, 8], LONG | {"temperature": 0.0}) for row in range(12)]
    expected = group.run(rollout_ranks.responses, greedy)
    others = [([30 + row, 31], LONG) for row in range(12)]
    assert group.run(rollout_ranks.error_in_step, 5, others) == ["wrong"] * 2
    assert group.run(rollout_ranks.responses, greedy) == expected
    group.run(rollout_ranks.drop)


def test_stages_agree_on_grammars_and_go_on_after_responses_were_cut(
    ranks, checkpoint, tmp_path
) -> None:
    group = ranks[2]
    group.run(rollout_ranks.build, tmp_path / "job", checkpoint, 1, 2, load_format="auto")
    expected = rollout_ranks.hugging_face_answers(checkpoint)
    many = [([5 + row, 6], LONG) for row in range(6)]
    assert group.run(rollout_ranks.cut_off, many, 9) == [0, 0]
    for answers in group.run(rollout_ranks.answers):
        rollout_ranks.assert_same_answers(answers, expected)
    mixed = [([5 + row, 6], LONG | GRAMMAR if row % 2 else LONG) for row in range(6)]
    first, second = group.run(rollout_ranks.responses, mixed)
    assert first == second
    for [(_, _, text, reason)] in first[1::2]:
        assert re.fullmatch(r"\d{3}(ab|cd)", text) and reason == "stop"
    for answers in group.run(rollout_ranks.answers):
        rollout_ranks.assert_same_answers(answers, expected)
    group.run(rollout_ranks.drop)
