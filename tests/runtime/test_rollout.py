"""Who answers which prompts, and what do scorers get to see while others are being answered?"""

import time

import pytest
import torch

from chatlearn_vllm.data.carried import Begun, Carried
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.cluster import Cluster
from chatlearn_vllm.runtime.errors import RankError
from chatlearn_vllm.runtime.rollout import Rollout, check_weight_version
from tests.helpers.toy_modules import write_job

SECONDS_PER_PROMPT = (0.02, 0.3)
"""By replica."""


class Answerer(BaseModule):
    """Answers one prompt after the other, twice each; replica 1 is slow."""

    open_prompts = ()

    def generate(self, prompt_indices, first_sample, iteration=0, is_eval=False, min_finished=None):
        given = [(index, first_sample + 2 * row) for row, index in enumerate(prompt_indices)]
        self.open_prompts = [*self.open_prompts, *given]
        num_open = len(self.open_prompts)
        num_done = num_open if min_finished is None else min(min_finished, num_open)
        # The last comes first, as if it were the shortest.
        done = self.open_prompts[::-1][:num_done]
        self.open_prompts = self.open_prompts[: num_open - num_done]
        if not done:
            return None
        time.sleep(SECONDS_PER_PROMPT[self.replica_id] * len(done))
        rows = sorted((first + copy, index) for index, first in done for copy in range(2))
        return {
            "sample_index": torch.tensor([sample for sample, _ in rows]),
            "prompt_index": torch.tensor([index for _, index in rows]),
            "replica": torch.full((len(rows),), self.replica_id),
            "num_open": torch.full((len(rows),), num_open),
            "time": torch.full((len(rows),), time.time(), dtype=torch.float64),
        }


class PartialAnswerer(BaseModule):
    """Writes one token per step to each open prompt, which ends after `prompt_index` tokens."""

    open_prompts = ()
    version = 1

    def generate(
        self, prompt_indices, first_sample, iteration, is_eval, min_finished, max_steps, carried
    ):
        assert not prompt_indices and not is_eval
        self.version = iteration
        for one in carried:
            one.responses = one.responses or [Begun(), Begun()]
        self.open_prompts = [*self.open_prompts, *carried]
        done = self.take_finished()
        for _ in range(max_steps):
            if len(done) >= min(min_finished, len(self.open_prompts) + len(done)):
                break
            for one in self.open_prompts:
                for begun in one.responses:
                    begun.token_ids.append(7)
                    begun.versions.append(self.version)
            done += self.take_finished()
        rows = [(one, copy) for one in done for copy in range(2)]
        if not rows:
            return None
        return {
            "sample_index": torch.tensor([one.first_sample + copy for one, copy in rows]),
            "prompt_index": torch.tensor([one.prompt_index for one, _ in rows]),
            "begun": [one.responses[copy] for one, copy in rows],
        }

    def take_finished(self):
        def is_finished(one):
            return len(one.responses[0].token_ids) >= one.prompt_index

        done = [one for one in self.open_prompts if is_finished(one)]
        self.open_prompts = [one for one in self.open_prompts if not is_finished(one)]
        return done

    def cut(self):
        left, self.open_prompts = self.open_prompts, []
        return [Carried(one.prompt_index, one.first_sample, 0, one.responses) for one in left]


class Scorer(BaseModule):
    """Ten times the ordinal, and when."""

    def forward_step(self, data, iteration=0):
        if iteration == 13:
            raise ValueError("an unlucky episode")
        if iteration == 14:
            return {"rewards": [0.0]}
        now = torch.full((len(data["sample_index"]),), time.time(), dtype=torch.float64)
        return {"rewards": 10.0 * data["sample_index"] + iteration, "scored": now}


@pytest.fixture(scope="module")
def groups(shared_cluster, tmp_path_factory):
    session.init(
        str(write_job(tmp_path_factory.mktemp("rollout"))),
        ["models.reward.num_cpu=2", "models.policy_trainer.trainable=False"],
    )
    modules = [Answerer("policy"), PartialAnswerer("policy_trainer"), Scorer("reward")]
    cluster = Cluster(modules[0].job, modules)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


PROMPTS = [7, 3, 9, 3, 1, 0, 5, 8, 2, 2, 6, 4, 11, 10, 13, 12, 15, 14, 17, 16]


def assert_in_order(batch, first_sample):
    count = 2 * len(PROMPTS)
    assert batch["sample_index"].tolist() == list(range(first_sample, first_sample + count))
    assert batch["prompt_index"].tolist() == [index for index in PROMPTS for _ in range(2)]


def test_what_all_replicas_can_work_on_is_split_beforehand_and_answered_in_one_call(groups):
    batch = Rollout(groups["policy"], max_open=10).generate(PROMPTS[:12], 100, 2, 1)

    assert batch["replica"].tolist() == [0] * 12 + [1] * 12
    assert batch["num_open"].unique().tolist() == [6]
    assert batch["sample_index"].tolist() == list(range(100, 124))


def test_without_a_limit_each_replica_answers_its_share_in_one_call(groups):
    batch = Rollout(groups["policy"]).generate(PROMPTS[:5], 0, 2, 1)

    assert batch["replica"].tolist() == [0] * 6 + [1] * 4
    assert batch["num_open"].tolist() == [3] * 6 + [2] * 4


def test_a_replica_that_is_free_gets_the_prompts_that_wait(groups):
    batch = Rollout(groups["policy"], max_open=3).generate(PROMPTS, 40, 2, 1)

    assert_in_order(batch, 40)
    of_fast, of_slow = ((batch["replica"] == replica).sum().item() for replica in (0, 1))
    assert of_slow >= 2 and of_fast >= 2 * of_slow
    assert batch["num_open"].max() <= 3 + 2  # and work for two calls of one prompt


def test_samples_are_scored_while_others_are_being_made(groups):
    rollout = Rollout(groups["policy"], max_open=3, scorers=[groups["reward"]])
    batch = rollout.generate(PROMPTS, 0, 2, 5)
    assert rollout.scores_meanwhile("reward") and not rollout.scores_meanwhile("policy")
    scores = rollout.scores("reward")

    assert_in_order(batch, 0)
    assert scores["rewards"].tolist() == [10.0 * sample + 5 for sample in range(40)]
    assert scores["scored"].min() < batch["time"].max()


def test_more_replicas_than_prompts_are_no_problem(groups):
    batch = Rollout(groups["policy"], max_open=1).generate([4], 0, 2, 1)

    assert batch["prompt_index"].tolist() == [4, 4]
    assert batch["replica"].tolist() == [0, 0]


def test_a_scorer_that_fails_meanwhile_is_named(groups):
    rollout = Rollout(groups["policy"], max_open=3, scorers=[groups["reward"]])

    with pytest.raises(RankError, match="(?s)reward, replica .*an unlucky episode"):
        rollout.generate(PROMPTS, 0, 2, 13)
        rollout.scores("reward")


def test_a_scorer_that_leaves_samples_out_is_named(groups):
    rollout = Rollout(groups["policy"], max_open=3, scorers=[groups["reward"]])

    with pytest.raises(ValueError, match=r"models.reward: forward_step\(\) returned 1 rows for 2"):
        rollout.generate(PROMPTS, 0, 2, 14)
        rollout.scores("reward")


def test_long_responses_go_on_in_later_episodes_until_their_last_round(groups):
    prompts = [5, 5000, 9, 5, 1500, 9, 5, 9]
    work = [Carried(index, 2 * place, 0, []) for place, index in enumerate(prompts)]
    rollout = Rollout(groups["policy_trainer"], max_open=4)

    batch, carried = rollout.generate_until(work, 5, 2, iteration=1, max_rounds=3)

    # The first of those that are answered, however many more are.
    assert batch["sample_index"].tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13]
    assert "begun" not in batch
    assert [(one.prompt_index, one.num_rounds) for one in carried] == [(5000, 1), (1500, 1), (9, 1)]

    new = [Carried(3, 16 + 2 * place, 0, []) for place in range(4)]
    batch, carried = Rollout(groups["policy_trainer"], max_open=4).generate_until(
        [*carried, *new], 5, 2, iteration=2, max_rounds=3
    )

    assert batch["sample_index"].tolist()[:2] == [14, 15]
    assert [(one.prompt_index, one.num_rounds) for one in carried] == [(5000, 2), (1500, 2)]
    versions = carried[0].responses[0].versions
    assert versions == sorted(versions) and set(versions) == {1, 2}

    batch, carried = Rollout(groups["policy_trainer"], max_open=4).generate_until(
        carried, 1, 2, iteration=3, max_rounds=3
    )

    # Both are answered in their last round, though one would have been enough.
    assert batch["prompt_index"].tolist() == [5000, 5000]
    assert [(one.prompt_index, len(one.responses[0].token_ids)) for one in carried] == [
        (1500, 1500)
    ]


def test_prompts_that_nobody_had_room_for_stay_as_they_are(groups):
    work = [Carried(index, 2 * place, 0, []) for place, index in enumerate([1] * 4 + [3000] * 16)]

    batch, carried = Rollout(groups["policy_trainer"], max_open=2).generate_until(
        work, 4, 2, iteration=1, max_rounds=2
    )

    assert batch["prompt_index"].tolist() == [1] * 8
    assert len(carried) == 16
    untouched = [one for one in carried if one.num_rounds == 0]
    assert untouched and all(one.responses == [] for one in untouched)


def test_prompts_answered_beyond_those_asked_for_keep_their_own_responses(groups):
    work = [Carried(1, 2 * place, 0, []) for place in range(6)]
    batch, carried = Rollout(groups["policy_trainer"], max_open=4).generate_until(
        work, 2, 2, iteration=1, max_rounds=2
    )

    assert batch["sample_index"].tolist() == [0, 1, 2, 3]
    tokens = [(one.first_sample, [begun.token_ids for begun in one.responses]) for one in carried]
    assert tokens == [(first, [[7], [7]]) for first in (4, 6, 8, 10)]


def test_samples_of_other_weights_than_the_last_sync_are_an_error():
    batch = {"weight_version": torch.tensor([4, 3, 4, 2, 3])}
    with pytest.raises(
        RuntimeError, match=r"3 of 5 samples .* weight version \[2, 3\], .* was .* 4"
    ):
        check_weight_version(batch, 4)
    check_weight_version({"weight_version": torch.tensor([4, 4])}, 4)
