"""What a reward model does in a job: scores responses at their last token, learns from pairs."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from chatlearn_vllm.modules.pairs import interleave_pairs
from chatlearn_vllm.modules.reward_module import RewardModule, at_last_token
from tests.megatron import tiny_models
from tests.megatron.tiny_modules import assert_same_metrics, built, job

BY_TOKENS = {"max_tokens_per_micro_batch": 44, "seq_length": 22}
PACKED = {**BY_TOKENS, "sequence_packing": True}


class Doubled(RewardModule):
    """A loss of the user's own."""

    def loss(self, batch, chosen, rejected):
        assert batch["margin"].shape == (2 * len(chosen), 1)
        pair_loss, sums = super().loss(batch, chosen, rejected)
        return 2 * pair_loss, {**sums, "margin": batch["margin"][::2].sum()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("llama"), head="scalar")


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def one_rank_metrics(ranks, llama):
    """Two optimizer steps on 4 of 8 pairs each, in micro-batches of 4."""
    return ranks[1].run(train, llama, train_micro_batch_size=4)[0]


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [(1, {}), (4, {"tp": 2, "pp": 2, "sequence_parallel": True}), (2, {"pp": 2, **PACKED})],
)
def test_rewards_are_read_at_the_last_response_token(ranks, llama, world_size, settings):
    expected = rewards_of_hugging_face(llama, tiny_models.batch())
    for found in ranks[world_size].run(score, llama, **settings):
        assert found.keys() == {"rewards"}
        assert found["rewards"].shape == (8,) and found["rewards"].dtype == torch.float32
        assert (found["rewards"] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {"train_micro_batch_size": 1}),
        (2, {"train_micro_batch_size": 2}),
        (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
        (2, BY_TOKENS),
        (2, {"tp": 2, **PACKED}),
    ],
)
def test_learning_does_not_depend_on_the_layout(
    ranks, llama, one_rank_metrics, world_size, settings
):
    for metrics in ranks[world_size].run(train, llama, **settings):
        assert_same_metrics(metrics, one_rank_metrics)


def test_a_filler_of_a_last_step_does_not_count(ranks, llama):
    (expected,) = ranks[1].run(train, llama, num_pairs=5)
    assert expected[1]["pairs"] == 1  # and two micro-batches, which the schedule wants
    settings = {"pp": 2, "virtual_pipeline_model_parallel_size": 2, **PACKED}
    for found in ranks[2].run(train, llama, num_pairs=5, **settings):
        assert found[1] == pytest.approx(expected[1], rel=2e-4, abs=2e-6)


def test_the_first_step_is_that_of_the_formula(llama, one_rank_metrics):
    rows = {key: value[:4] for key, value in pairs().items()}
    chosen, rejected = (
        rewards_of_hugging_face(llama, {key: rows[f"{side}_{key}"] for key in KEYS})
        for side in ("chosen", "rejected")
    )
    first = one_rank_metrics[0]
    assert first["loss"] == pytest.approx(float(-F.logsigmoid(chosen - rejected).mean()), rel=1e-5)
    assert first["chosen_reward"] == pytest.approx(float(chosen.mean()), abs=1e-5)
    assert first["reward_margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    assert first["accuracy"] == float((chosen > rejected).float().mean())
    assert 0 < first["accuracy"] < 1
    assert first["pairs"] == 4


def test_pairs_are_learned_from_a_causal_model(ranks, causal):
    metrics = ranks[2].run(train, causal, num_training_epoch=12, lr=3e-3)[0]
    assert metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2: all rewards are 0
    assert metrics[-1]["loss"] < 0.3
    assert metrics[-1]["accuracy"] == 1.0


def test_a_loss_of_the_users_own_gets_the_other_tensors_of_a_pair(ranks, llama, one_rank_metrics):
    (metrics,) = ranks[1].run(train, llama, Doubled, train_micro_batch_size=2)
    assert metrics[0]["loss"] == pytest.approx(2 * one_rank_metrics[0]["loss"], rel=1e-5)
    assert metrics[0]["margin"] == pytest.approx((0 + 1 + 2 + 3) / 4)


def test_a_frozen_model_without_a_head_is_refused(ranks, causal):
    (message,) = ranks[1].run(error_of_building, causal)
    assert message.startswith(f"models.trainer: load='{causal}' has no score.weight")
    assert "trainable: True" in message


def test_a_micro_batch_without_room_for_a_pair_is_refused_at_once(llama):
    settings = {"max_tokens_per_micro_batch": 43, "seq_length": 22}
    module = RewardModule("trainer", job(llama, world_size=1, **settings))
    with pytest.raises(ValueError, match="_batch=43 must be at least 2 x seq_length = 44: the two"):
        module.init()


def test_rows_without_a_response_are_refused(ranks, llama):
    scoring, training, missing, too_long = ranks[1].run(errors, llama)[0]
    assert "models.trainer: loss_mask is 0 on all tokens of rows [3]" in scoring
    assert "models.trainer: rejected_loss_mask is 0 on all tokens of rows [1]" in training
    assert missing.endswith("add chosen_loss_mask")
    assert "2 sequences that belong together take" in too_long
    assert "raise that key to at least 2 x seq_length" in too_long


def test_rows_of_a_pair_become_neighbours():
    data = {
        "chosen_all_tokens": torch.tensor([[1, 1], [2, 2]]),
        "rejected_all_tokens": torch.tensor([[3, 3], [4, 4]]),
        "texts": ["a", "b"],
    }
    assert interleave_pairs(data)["all_tokens"].tolist() == [[1, 1], [3, 3], [2, 2], [4, 4]]
    assert interleave_pairs(data).keys() == {"all_tokens"}
    data["rejected_all_tokens"] = torch.ones(2, 3)
    with pytest.raises(ValueError, match="same keys and shapes on both sides"):
        interleave_pairs(data)


def test_the_last_marked_value_is_found_and_has_the_gradient():
    values = torch.arange(12.0).view(3, 4).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]])
    found = at_last_token(values, mask)
    assert found.tolist() == [2, 0, 11]
    found.sum().backward()
    assert values.grad.nonzero().tolist() == [[0, 2], [2, 3]]


# ---- on the ranks -------------------------------------------------------------------------------

KEYS = ("all_tokens", "loss_mask")


def pairs():
    """Eight pairs whose rows have different lengths."""
    rows = {
        f"{side}_{key}": value
        for side, seed in (("chosen", 5), ("rejected", 6))
        for key, value in tiny_models.batch(seed=seed).items()
    }
    margin = torch.arange(8.0).unsqueeze(1)
    return {**rows, "chosen_margin": margin, "rejected_margin": margin}


def score(path, **settings):
    with built(RewardModule, path, trainable=False, **settings) as module:
        return module.forward_step(tiny_models.batch())


def train(path, kind=RewardModule, num_pairs=8, **settings):
    """Of every group of 4 pairs, which one step takes, each rank has its share."""
    with built(kind, path, **settings) as module:
        per_step = 4 // module.data_parallel_size
        mine = [row for row in range(num_pairs) if row % 4 // per_step == module.data_parallel_rank]
        return module.train({key: value[mine] for key, value in pairs().items()})


def error_of_building(path):
    try:
        with built(RewardModule, path, trainable=False):
            return ""
    except ValueError as error:
        return str(error)


def errors(path):
    """Of an empty response to be scored, one in a pair, a missing key, a pair that is too long."""
    empty = tiny_models.batch()
    empty["loss_mask"][3] = 0
    empty_pair = pairs()
    empty_pair["rejected_loss_mask"][1] = 0
    incomplete = pairs()
    del incomplete["chosen_loss_mask"]
    found = []
    with built(RewardModule, path, max_tokens_per_micro_batch=24, seq_length=12) as module:
        for call, data in (
            (module.forward_step, empty),
            (module.train, empty_pair),
            (module.train, incomplete),
            (module.train, pairs()),
        ):
            try:
                call(data)
            except ValueError as error:
                found.append(str(error))
    return found


def rewards_of_hugging_face(path, rows):
    """Scores [B] at the last token that the mask marks; what follows it is made padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32
    )
    places = torch.arange(tiny_models.SEQ_LENGTH)
    ends = (rows["loss_mask"] * places).argmax(1, keepdim=True)
    with torch.no_grad():
        return model(torch.where(places > ends, 0, rows["all_tokens"])).logits[:, 0]
