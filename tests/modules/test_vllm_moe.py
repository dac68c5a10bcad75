"""Do models with experts take new weights, in their live parameters and through vLLM's loader?

Real engines on real ranks are compared with Hugging Face's greedy answers in float32.
"""

import pytest

from tests.helpers import rollout_ranks
from tests.helpers.ranks import RanksBySize
from tests.helpers.tiny_moe import save_tiny_moe

CASES = {
    "mixtral": ("mixtral", {}, 1, 1, {}),
    "qwen3_moe, logits of chosen experts not renormalised": (
        "qwen3_moe", {"norm_topk_prob": False}, 1, 1, {},
    ),
    "mixtral tp2": ("mixtral", {}, 2, 1, {}),
    "qwen3_moe tp2, experts whole": ("qwen3_moe", {}, 2, 1, {"enable_expert_parallel": True}),
    "mixtral tp2, experts whole, one rank has more": (
        "mixtral", {"num_local_experts": 5}, 2, 1, {"enable_expert_parallel": True},
    ),
    "qwen3_moe pp2": ("qwen3_moe", {}, 1, 2, {}),
}  # fmt: skip
NOT_SLOW = ("mixtral tp2", "qwen3_moe tp2, experts whole", "qwen3_moe pp2")


@pytest.fixture(scope="module")
def ranks():
    """`ranks[n].run(function, ...)` runs a module-level function on n ranks."""
    by_size = RanksBySize(2)
    yield by_size
    by_size.close()


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case not in NOT_SLOW)) for case in CASES],
)
def test_experts_answer_from_the_weights_that_were_written_last(ranks, tmp_path, case) -> None:
    family, config, tp, pp, model_args = CASES[case]
    first, second = (
        save_tiny_moe(tmp_path / str(seed), family, seed=seed, **config) for seed in (0, 1)
    )
    expected = {path: rollout_ranks.hugging_face_answers(path) for path in (first, second)}
    group = ranks[tp * pp]
    group.run(rollout_ranks.build, tmp_path / "job", first, tp, pp, **model_args)
    assert set(group.run(direct_copy_problem)) == {None}
    steps = [
        (rollout_ranks.write_checkpoint, first),
        (rollout_ranks.write_checkpoint, second),
        (rollout_ranks.load_checkpoint, first),
        (rollout_ranks.write_checkpoint, second),
    ]
    for version, (put, checkpoint) in enumerate(steps, start=1):
        assert set(group.run(put, checkpoint, version)) == {f"READY({version})"}
        for answers in group.run(rollout_ranks.answers):
            rollout_ranks.assert_same_answers(answers, expected[checkpoint])
    group.run(rollout_ranks.drop)


def direct_copy_problem() -> str | None:
    """On a rollout rank."""
    return rollout_ranks.policy().engine.direct_copy_problem()
