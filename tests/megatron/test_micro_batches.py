"""Losses, gradients and scores are the same however rows are grouped, padded or packed."""

import random

import numpy as np
import pytest
import torch

from chatlearn_vllm.config import ConfigError, load_config
from chatlearn_vllm.data.balance import row_lengths
from chatlearn_vllm.engines.megatron.micro_batches import (
    ModelInput,
    equal_groups,
    groups_by_tokens,
    put_back,
    take,
    trim,
)
from tests.megatron import tiny_models

MAX_TOKENS = 44
"""Two to five rows of `tiny_models.batch()`, which are 9 to 21 tokens long."""
FORMS = {
    "by tokens": {"max_tokens_per_micro_batch": MAX_TOKENS},
    "packed": {"sequence_packing": True},
    "packed by tokens": {"max_tokens_per_micro_batch": MAX_TOKENS, "sequence_packing": True},
}
DENSE_LAYOUTS = {
    "one rank": (1, {}),
    "dp2": (2, {}),
    "tp2, recompute attention": (2, {"tp": 2, "recompute_granularity": "selective"}),
    "tp2, sequence parallel, recompute": (
        2,
        {"tp": 2, "sequence_parallel": True, "recompute_granularity": "full"},
    ),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2 dp2, overlap": (4, {"pp": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2 pp2 vpp2, sequence parallel": (
        4,
        {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
    ),
}
EXPERT_LAYOUTS = {
    "ep2": (2, {"ep": 2}),
    "tp2 etp1 ep2": (2, {"tp": 2, "etp": 1, "ep": 2}),
    "pp2 vpp2 ep2": (4, {"pp": 2, "vpp": 2, "ep": 2}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module")
def llama_reference(ranks, llama):
    """One rank, micro-batches of two padded rows."""
    return ranks[1].run(steps_and_scores, llama)[0]


@pytest.fixture(scope="module")
def mixtral_reference(ranks, mixtral):
    return ranks[1].run(steps_and_scores, mixtral)[0]


# ---- on real ranks ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_training_does_not_depend_on_the_form(ranks, llama, llama_reference, layout, form):
    world_size, settings = DENSE_LAYOUTS[layout]
    for found in ranks[world_size].run(steps_and_scores, llama, **settings, **FORMS[form]):
        check_equal(found, llama_reference)
        check_bound(found, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_train_alike_in_each_form(ranks, mixtral, mixtral_reference, layout, form):
    world_size, settings = EXPERT_LAYOUTS[layout]
    results = ranks[world_size].run(steps_and_scores, mixtral, **settings, **FORMS[form])
    for found in results:
        check_equal(found, mixtral_reference)
        check_bound(found, form)
        assert found["shapes"] == results[0]["shapes"], "ranks that share experts wait for ever"


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_rows_does_not_matter(ranks, llama, llama_reference, form):
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    (found,) = ranks[1].run(steps_and_scores, llama, order=order, **FORMS[form])
    assert found["curve"][0] == pytest.approx(llama_reference["curve"][0], rel=1e-5)
    assert (found["scores"] - llama_reference["scores"][order]).abs().max() < 1e-5


@pytest.mark.parametrize("is_packed", [False, True])
def test_ranks_with_long_and_with_short_rows_run_equally_many(
    ranks, llama, llama_reference, is_packed
):
    lengths = row_lengths(tiny_models.batch())
    longest_first = sorted(range(8), key=lambda row: -lengths[row])
    # the first rank has every second row
    order = [row for pair in zip(longest_first[:4], longest_first[4:], strict=True) for row in pair]
    settings = {"max_tokens_per_micro_batch": 24, "sequence_packing": is_packed}
    long, short = ranks[2].run(steps_and_scores, llama, order=order, **settings)
    assert len(long["shapes"]) == len(short["shapes"]) == 4
    for found in (long, short):
        assert found["curve"][0] == pytest.approx(llama_reference["curve"][0], rel=1e-5)


def test_packing_takes_fewer_micro_batches_than_padding(ranks, llama):
    num_forwards = [
        len(ranks[1].run(steps_and_scores, llama, **FORMS[form])[0]["shapes"])
        for form in ("by tokens", "packed by tokens")
    ]
    assert num_forwards[1] < num_forwards[0]


def test_fewer_rows_than_virtual_stages_want_are_filled_up(ranks, llama):
    (expected,) = ranks[1].run(steps_and_scores, llama, order=[3])
    for form in ("by tokens", "packed by tokens"):
        settings = {"pp": 2, "vpp": 2, **FORMS[form]}
        for found in ranks[2].run(steps_and_scores, llama, order=[3], **settings):
            check_equal(found, expected)


def test_bf16_follows_the_float32_curve(ranks, llama, llama_reference):
    settings = {"tp": 2, "sequence_parallel": True, "dtype": "bfloat16"}
    for found in ranks[2].run(steps_and_scores, llama, **settings, **FORMS["packed by tokens"]):
        losses = [np.array(one["curve"])[:, 0] for one in (found, llama_reference)]
        assert np.allclose(*losses, rtol=0.02)


def test_a_row_longer_than_the_limit_is_refused_on_all_ranks(ranks, llama):
    # only one of the two data parallel ranks has the longest row
    lengths = sorted(row_lengths(tiny_models.batch()))
    assert lengths[-1] > lengths[-2]
    limit = lengths[-1] - 1
    for message in ranks[2].run(error_of_grouping, llama, max_tokens_per_micro_batch=limit):
        assert f"takes {limit + 1} tokens, more than max_tokens_per_micro_batch={limit}" in message


def test_unequal_rows_are_refused_instead_of_waiting(ranks, llama):
    for message in ranks[2].run(error_of_grouping, llama, num_rows=(3, 4), **FORMS["by tokens"]):
        assert "data parallel ranks have 3 to 4 rows" in message


@pytest.mark.parametrize("is_packed", [False, True])
def test_pairs_stay_together_within_the_limit(ranks, llama, is_packed):
    limit = 2 * MAX_TOKENS
    settings = {"max_tokens_per_micro_batch": limit, "sequence_packing": is_packed}
    (groups,) = ranks[1].run(groups_of_pairs, llama, 1, **settings)
    pairs = [(group[i], group[i + 1]) for group in groups for i in range(0, len(group), 2)]
    assert sorted(pairs) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    lengths = row_lengths(tiny_models.batch())
    tokens = [[lengths[row] for row in group] for group in groups]
    sizes = [sum(t) if is_packed else len(t) * max(t) for t in tokens]
    assert max(sizes) <= limit
    assert len(groups) == 2


def test_pairs_count_as_one_row(ranks, llama):
    (groups,) = ranks[1].run(groups_of_pairs, llama, 3)
    assert groups == [[0, 1, 2, 3], [4, 5, 6, 7]]  # two pairs each, of at most three


def test_attention_that_cannot_keep_packed_sequences_apart_is_refused(ranks, llama):
    (message,) = ranks[1].run(error_of_stock_attention, llama, sequence_packing=True)
    assert "sequence_packing=True: megatron-core's DotProductAttention" in message
    assert ranks[1].run(error_of_stock_attention, llama) == [None]


def check_equal(found, reference):
    curve, expected = found["curve"], reference["curve"]
    assert curve[0] == pytest.approx(expected[0], rel=1e-5)
    assert np.allclose(curve, expected, rtol=1e-4), f"{curve}\n{expected}"
    rank, size = found["data_parallel"]
    assert (found["scores"] - reference["scores"][rank::size]).abs().max() < 1e-5


def check_bound(found, form):
    if "max_tokens_per_micro_batch" in FORMS[form]:
        assert max(rows * length for rows, length in found["shapes"]) <= MAX_TOKENS


def steps_and_scores(path, order=None, **settings):
    """Two training steps; before them, the log-probabilities of this rank's rows.

    `order` gives which rows of `tiny_models.batch()`. "shapes" are those of the model's inputs in
    one step.
    """
    with tiny_models.engine(path, **settings) as engine:
        rows = tiny_models.batch()
        if order is not None:
            rows = {key: value[order] for key, value in rows.items()}
        rows = tiny_models.rows_of_rank(engine, rows)
        groups = engine.batching.group_rows(rows, 2, is_optimizer_step=False)
        parts = engine.forward_only(
            [take(rows, group) for group in groups],
            lambda batch, logprobs, _: logprobs * batch["loss_mask"][:, 1:],
        )
        shapes = []
        hook = engine.chunks[0].register_forward_pre_hook(
            lambda module, args: shapes.append(tuple(args[0].shape))
        )
        curve = tiny_models.train(engine, steps=1, rows=rows)
        hook.remove()
        return {
            "curve": curve + tiny_models.train(engine, steps=1, rows=rows),
            "scores": put_back(parts, groups, tiny_models.SEQ_LENGTH - 1),
            "data_parallel": (engine.data_parallel_rank, engine.data_parallel_size),
            "shapes": shapes,
        }


def groups_of_pairs(path, max_rows, **settings):
    """How rows of 9 to 21 tokens are grouped where neighbours stay together."""
    with tiny_models.engine(path, trainable=False, **settings) as engine:
        rows = tiny_models.batch()
        return engine.batching.group_rows(rows, max_rows, is_optimizer_step=True, together=2)


def error_of_grouping(path, num_rows=(4, 4), **settings):
    with tiny_models.engine(path, trainable=False, **settings) as engine:
        rows = tiny_models.rows_of_rank(engine, tiny_models.batch())
        rows = {key: value[: num_rows[engine.data_parallel_rank]] for key, value in rows.items()}
        try:
            engine.batching.group_rows(rows, 2, is_optimizer_step=True)
        except ValueError as error:
            return str(error)


def error_of_stock_attention(path, **settings):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    def provider(pre_process=True, post_process=True, vp_stage=None):
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        return GPTModel(
            made.config, spec, vocab_size=tiny_models.VOCAB_SIZE, max_sequence_length=64,
            position_embedding_type="rope",
        )  # fmt: skip

    made = tiny_models.MegatronEngine(
        tiny_models.ModelArgs(load=str(path), dtype="float32", **settings),
        trainable=False,
        model_provider=provider,
    )
    try:
        made.build()
    except ValueError as error:
        return str(error)
    finally:
        made.shutdown()


# ---- which rows go together ---------------------------------------------------------------------


def test_padded_groups_take_the_longest_first():
    lengths = [10, 9, 5, 5, 4, 2]
    assert groups_by_tokens(lengths, 20, is_packed=False) == [[0, 1], [2, 3, 4, 5]]


def test_packed_groups_fill_up_with_short_rows():
    # 10 + 9, then 5 + 5 + 4 + 2: one token of the first 20 is left, too few for any
    lengths = [10, 9, 5, 5, 4, 2]
    assert groups_by_tokens(lengths, 20, is_packed=True) == [[0, 1], [2, 3, 4, 5]]
    assert groups_by_tokens(lengths, 16, is_packed=True) == [[0, 2], [1, 3, 5], [4]]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_no_group_has_too_many_tokens_and_every_row_is_in_one(is_packed, multiple_of):
    generator = random.Random(3)
    lengths = sorted((generator.randint(2, 500) for _ in range(200)), reverse=True)
    groups = groups_by_tokens(lengths, 1000, is_packed=is_packed, multiple_of=multiple_of)
    assert sorted(sum(groups, [])) == list(range(200))
    assert len(groups) % multiple_of == 0
    assert groups[0][0] == 0
    tokens = [[lengths[row] for row in group] for group in groups]
    sizes = [sum(t) if is_packed else len(t) * max(t) for t in tokens]
    assert max(sizes) <= 1000
    assert sum(lengths) / (1000 * len(groups)) > (0.9 if is_packed else 0.7)


def test_groups_are_halved_and_then_filled_up_to_a_multiple():
    assert groups_by_tokens([4, 3, 3, 2], 12, is_packed=True, multiple_of=2) == [[0, 1], [2, 3]]
    assert groups_by_tokens([4, 3], 12, is_packed=True, multiple_of=4) == [[0], [1], [], []]


def test_equal_groups_have_one_size_and_a_number_that_fits():
    assert equal_groups(6, 4) == [[0, 1, 2], [3, 4, 5]]
    assert equal_groups(6, 4, multiple_of=3) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="multiple of 4"):
        equal_groups(6, 3, multiple_of=4)


def test_results_of_groups_return_to_their_rows():
    batch = {"row": torch.tensor([10.0, 11.0, 12.0]), "text": ["a", "b", "c"]}
    groups = [[2], [], [0, 1]]
    parts = [take(batch, rows) for rows in groups]
    assert [part["text"] for part in parts] == [["c"], ["a"], ["a", "b"]]
    widened = [part["row"].unsqueeze(1).expand(-1, 1 + i) for i, part in enumerate(parts)]
    assert put_back(widened, groups, width=3).tolist() == [[10, 10, 10], [11, 11, 11], [12, 0, 0]]


def test_no_token_of_a_filler_counts():
    batch = {"all_tokens": torch.ones(2, 3, dtype=torch.int64), "loss_mask": torch.ones(2, 3)}
    assert not take(batch, [])["loss_mask"].any()
    assert take(batch, [], together=2)["loss_mask"].shape == (2, 3)
    assert batch["loss_mask"].all(), "the batch itself stays as it is"


# ---- how they lie in the model's input ----------------------------------------------------------


def rows_of_lengths(*lengths: int) -> dict[str, torch.Tensor]:
    """Rows of 6 tokens; row r has the tokens 10 r + 1, 10 r + 2, ..., then 7."""
    tokens = torch.full((len(lengths), 6), 7)
    mask = torch.zeros(len(lengths), 6)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.arange(1, length + 1) + 10 * row
        mask[row, 1:length] = 1.0
    return {"all_tokens": tokens, "loss_mask": mask}


def test_micro_batches_lose_common_padding():
    batch = tiny_models.batch(rows=6)
    batch["logprobs"] = torch.zeros(6, tiny_models.SEQ_LENGTH - 1)
    batch["text"] = ["a"] * 6
    trimmed, length = trim([take(batch, rows) for rows in ([0, 1, 2], [3, 4, 5])])
    assert length == max(row_lengths(batch)) < tiny_models.SEQ_LENGTH
    assert trimmed[0]["all_tokens"].shape == (3, length)
    assert trimmed[0]["logprobs"].shape == (3, length - 1)
    assert trimmed[0]["text"] == ["a"] * 3


def test_packed_rows_lie_behind_each_other_and_count_from_zero():
    from chatlearn_vllm.engines.megatron.attention import packed_seq_params

    packed = ModelInput.packed(rows_of_lengths(3, 2)).lengthened(6)
    assert packed.tokens().tolist() == [[1, 2, 3, 11, 12, 0]]
    assert packed.positions().tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packed.part_lengths == [3, 2, 1]
    params = packed_seq_params(packed.part_lengths, torch.device("cpu"))
    assert params.cu_seqlens_q.tolist() == [0, 3, 5, 6]
    assert params.max_seqlen_q == 3


def test_values_of_packed_tokens_return_to_their_rows():
    packed = ModelInput.packed(rows_of_lengths(3, 2, 6))
    values = torch.arange(11.0).unsqueeze(0).requires_grad_()
    found = packed.by_row(values)
    assert found.tolist() == [[0, 1, 0, 0, 0], [3, 0, 0, 0, 0], [5, 6, 7, 8, 9]]
    found.sum().backward()
    assert values.grad.tolist() == [[1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0]]


def test_values_of_all_packed_tokens_return_to_their_rows():
    packed = ModelInput.packed(rows_of_lengths(3, 2, 6)).lengthened(12)
    found = packed.by_row(torch.arange(12.0).unsqueeze(0), num_left_out=0)
    assert found.tolist() == [[0, 1, 2, 0, 0, 0], [3, 4, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10]]


def test_padded_rows_keep_their_form():
    padded = ModelInput.padded(rows_of_lengths(3, 2)).lengthened(8)
    assert padded.tokens().shape == padded.positions().shape == padded.shape == (2, 8)
    values = torch.arange(16.0).view(2, 8)
    assert padded.by_row(values).tolist() == values[:, :5].tolist()
    assert padded.by_row(values, num_left_out=0).tolist() == values[:, :6].tolist()


# ---- yaml ---------------------------------------------------------------------------------------

JOB = """
models:
  policy_trainer: {num_gpu: 2, trainable: True, model_args: {%s}}
runtime: {sample_per_episode: 12, train_micro_batch_size: 4, train_global_batch_size: 6}
"""


def test_a_limit_below_the_longest_sequence_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB % "seq_length: 64, max_new_tokens: 32, max_tokens_per_micro_batch: 63")
    with pytest.raises(ConfigError, match="micro_batch=63: must be at least seq_length=64"):
        load_config(path)


def test_rows_per_step_need_not_fit_a_number_of_rows_that_is_not_used(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB % "seq_length: 64, max_new_tokens: 32")
    with pytest.raises(ConfigError, match="must be a multiple of 8 = train_micro_batch_size x"):
        load_config(path)
    path.write_text(JOB % "seq_length: 64, max_new_tokens: 32, max_tokens_per_micro_batch: 64")
    assert load_config(path).runtime.train_global_batch_size == 6
    with pytest.raises(ConfigError, match="must be a multiple of 2 = data parallel size of"):
        load_config(path, ["runtime.train_global_batch_size=5"])
