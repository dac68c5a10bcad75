"""Does a policy generate as documented? One real vLLM engine serves all tests of this file."""

import copy
import gc
import json

import pytest
import torch

from chatlearn_vllm.data.batch import check_batch, concat, select
from chatlearn_vllm.data.carried import Begun, Carried
from chatlearn_vllm.data.rollouts import rollouts_to_batch
from chatlearn_vllm.engines.generation_engine import EngineStateError
from chatlearn_vllm.engines.vllm_partial import PartialRequest
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.engines import (
    SEQ_LENGTH,
    change_model_args,
    policy_job,
    put_weights,
    start_policy,
)
from tests.helpers.tiny_llama import save_tiny_llama

PROMPTS = ["12+34=", "a", "The sum of 1 and 2 is", "0" * 40, "x y z"]


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model = save_tiny_llama(directory)
    model.directory = directory
    return model


@pytest.fixture(scope="module")
def policy(hf_model, tmp_path_factory):
    job = policy_job(
        tmp_path_factory.mktemp("job"), hf_model.directory,
        n=3, temperature=0.7, eval_temperature=0.0, block_size=16, bf16=True, stop_token_list="~;@",
        max_num_batched_tokens=SEQ_LENGTH,
    )  # fmt: skip
    module = start_policy(VLLMPolicyInference, job)
    module.build_prompts(PROMPTS)
    module.build_prompts(PROMPTS[:3], is_eval=True)
    with pytest.raises(EngineStateError) as refusal:
        module.generate([0], first_sample=0)
    module.refusal_before_weights = str(refusal.value)
    return module


@pytest.fixture
def ready(policy, hf_model):
    policy.misbehave = None
    policy.wake_weights()
    put_weights(policy, hf_model, version=1)
    policy.wake_kv_cache()
    policy.steps.clear()
    policy.eval_modes.clear()
    return policy


def hf_logprobs(model, tokens, temperature=1.0):
    """[S-1] log-probability of each next token under the Hugging Face model."""
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].float() / temperature
    return logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]


def response(batch, row):
    return batch["all_tokens"][row][batch["loss_mask"][row] == 1]


def test_generating_before_any_weights_arrived_is_refused(policy) -> None:
    assert "the engine is DUMMY, it must be READY" in policy.refusal_before_weights


def test_batch_follows_the_contract_in_request_order(ready) -> None:
    batch = ready.generate([4, 0, 2], first_sample=0)
    check_batch(batch, SEQ_LENGTH)
    assert ready.request_ids == ["0", "3", "6"]
    assert batch["str_prompts"] == [PROMPTS[i] for i in (4, 0, 2) for _ in range(3)]
    assert batch["prompt_index"].tolist() == [4, 4, 4, 0, 0, 0, 2, 2, 2]
    assert batch["sample_index"].tolist() == list(range(9))
    assert batch["weight_version"].tolist() == [1] * 9
    tokenizer = ready.tokenizer.tokenizer
    for row in range(9):
        prompt = batch["no_padded_query_ids"][row]
        assert torch.equal(batch["all_tokens"][row, : len(prompt)], prompt)
        assert prompt.tolist() == tokenizer.encode(batch["str_prompts"][row])


def test_forward_step_sees_every_scheduled_token_once(ready) -> None:
    batch = ready.generate([0, 1], first_sample=0)
    assert [iteration for iteration, _ in ready.steps] == list(range(len(ready.steps)))
    prompt_tokens = sum(len(batch["no_padded_query_ids"][row]) for row in range(6))
    responses = int(batch["loss_mask"].sum())
    cached = prompt_tokens - sum(len(batch["no_padded_query_ids"][row]) for row in (0, 3))
    scheduled = sum(tokens for _, tokens in ready.steps)
    # The last token of a response is sampled and not fed back.
    assert prompt_tokens - cached <= scheduled <= prompt_tokens + responses - 6


def test_evaluations_have_a_step_of_their_own(ready) -> None:
    ready.generate([0], first_sample=0)
    num_steps = len(ready.eval_modes)
    assert ready.eval_modes == [False] * num_steps
    ready.generate([0], first_sample=0, is_eval=True)
    assert ready.eval_modes[num_steps:] == [True] * (len(ready.eval_modes) - num_steps)
    assert len(ready.eval_modes) > num_steps > 0


def test_add_request_without_is_eval_samples_as_the_prompts_are_asked_for(
    ready, monkeypatch
) -> None:
    """The signature of the documentation page's first listing."""
    expected = [
        ready.generate([0, 1], first_sample=0, is_eval=is_eval) for is_eval in (False, True)
    ]

    def _add_request(data):
        return ready._add_request_internal(data["prompt"], data["input_ids"])

    monkeypatch.setattr(ready, "_add_request", _add_request)
    for is_eval, batch in zip((False, True), expected, strict=True):
        again = ready.generate([0, 1], first_sample=0, is_eval=is_eval)
        assert torch.equal(again["all_tokens"], batch["all_tokens"])


def test_logprobs_of_prompts_come_if_the_yaml_asks_for_them(ready, hf_model, monkeypatch) -> None:
    change_model_args(monkeypatch, ready, prompt_logprobs=1)
    batch = ready.generate([0, 2], first_sample=0)
    assert len(batch["logprobs"]) == 6
    for row in range(6):
        prompt = batch["no_padded_query_ids"][row]
        got = batch["logprobs"][row, : len(prompt) - 1]
        torch.testing.assert_close(got, hf_logprobs(hf_model, prompt), atol=1e-4, rtol=0)


def test_logprobs_are_of_the_distribution_at_the_sampling_temperature(ready, hf_model) -> None:
    batch = ready.generate(list(range(5)), first_sample=0)
    for row in range(len(batch["all_tokens"])):
        mask = batch["loss_mask"][row, 1:] == 1
        length = int(mask.nonzero().max()) + 2
        want = hf_logprobs(hf_model, batch["all_tokens"][row, :length], temperature=0.7)
        got = batch["logprobs"][row, : length - 1]
        assert torch.allclose(got[mask[: length - 1]], want[mask[: length - 1]], atol=1e-4)


def test_prompts_of_more_tokens_than_a_step_takes_are_answered_as_alone(ready) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 90, (4, 70), generator=generator).tolist()
    sampling = {"temperature": 0.7, "max_tokens": 12, "logprobs": 0}
    for row, prompt in enumerate(prompts):
        ready.engine.add_request(str(row), None, prompt, sampling | {"seed": row})
    together = ready.engine.run()
    assert len({answer.outputs[0].text for answer in together}) == 4
    for row, prompt in enumerate(prompts):
        ready.engine.add_request("alone", None, prompt, sampling | {"seed": row})
        (alone,) = ready.engine.run()
        assert list(alone.outputs[0].token_ids) == list(together[row].outputs[0].token_ids)


def test_truncated_sampling_reports_logprobs_of_the_renormalised_rest(ready, hf_model) -> None:
    prompt = ready.tokenizer.tokenizer.encode("12+34=")
    sampling = {"temperature": 0.7, "top_k": 5, "max_tokens": 12, "seed": 1, "logprobs": 0}
    ready.engine.add_request("0", None, prompt, sampling)
    batch = rollouts_to_batch(ready.engine.run(), SEQ_LENGTH, pad_token_id=2)
    mask = batch["loss_mask"][0, 1:] == 1
    tokens = batch["all_tokens"][0, : int(mask.nonzero().max()) + 2]
    with torch.no_grad():
        logits = hf_model(tokens[None]).logits[0].float()[:-1] / 0.7
    kept = logits.topk(5).values
    want = logits.gather(1, tokens[1:, None])[:, 0] - kept.logsumexp(-1)
    got = batch["logprobs"][0, : len(want)]
    sampled = mask[: len(want)]
    assert torch.allclose(got[sampled], want[sampled], atol=1e-4)
    full = hf_logprobs(hf_model, tokens, temperature=0.7)
    assert (got[sampled] > full[sampled]).all()


def test_greedy_evaluation_equals_hugging_face_generate(ready, hf_model) -> None:
    batch = ready.generate([0, 1, 2], first_sample=0, is_eval=True)
    assert len(batch["all_tokens"]) == 3
    for row in range(3):
        prompt = batch["no_padded_query_ids"][row]
        with torch.no_grad():
            want = hf_model.generate(prompt[None], max_new_tokens=12, do_sample=False)[0]
        got = response(batch, row)
        text = ready.tokenizer.tokenizer.decode(want[len(prompt) :])
        if not any(stop in text for stop in "~@"):
            assert got.tolist() == want[len(prompt) :].tolist()
        assert torch.equal(got, want[len(prompt) : len(prompt) + len(got)])


def test_only_sampled_tokens_are_actions(ready) -> None:
    batch = ready.generate(list(range(5)) * 8, first_sample=100)
    eos = ready.tokenizer.tokenizer.eos_token_id
    ended = cut = 0
    for row in range(len(batch["all_tokens"])):
        tokens = response(batch, row)
        start = len(batch["no_padded_query_ids"][row])
        assert (batch["all_tokens"][row, start + len(tokens) :] == eos).all()
        assert (tokens[:-1] != eos).all()
        ended += int(tokens[-1] == eos)
        cut += int(len(tokens) == 12 and tokens[-1] != eos)
    assert ended > 0
    assert cut > 0


def test_equal_seeds_give_equal_samples_and_others_differ(ready) -> None:
    first = ready.generate([0, 1], first_sample=0)
    again = ready.generate([0, 1], first_sample=0)
    other = ready.generate([0, 1], first_sample=6)
    assert torch.equal(first["all_tokens"], again["all_tokens"])
    assert torch.equal(first["logprobs"], again["logprobs"])
    assert not torch.equal(first["all_tokens"], other["all_tokens"])


def test_a_sample_depends_on_its_ordinal_and_not_on_its_batch(ready) -> None:
    together = ready.generate([0, 0, 0], first_sample=0)
    alone = ready.generate([0], first_sample=6)
    assert torch.equal(together["all_tokens"][6:], alone["all_tokens"])
    assert len({tuple(row.tolist()) for row in together["all_tokens"]}) > 1


def test_with_one_seed_per_rollout_equal_rollouts_repeat_and_others_differ(
    ready, monkeypatch
) -> None:
    monkeypatch.setattr(ready.engine, "seed_per_response", False)
    first, again = ready.generate([1, 3, 4], 0), ready.generate([1, 3, 4], 0)
    other = ready.generate([1, 3, 4], 100)
    assert torch.equal(first["all_tokens"], again["all_tokens"])
    assert not torch.equal(first["all_tokens"], other["all_tokens"])
    of_one_prompt = {tuple(row.tolist()) for row in first["all_tokens"][:3]}
    assert len(of_one_prompt) == 3


def test_prompts_can_come_and_answers_leave_while_others_are_being_answered(ready) -> None:
    whole = ready.generate([0, 3, 1, 4, 2], first_sample=0)
    parts = [
        ready.generate([0, 3], 0, min_finished=1),
        ready.generate([1, 4, 2], 6, min_finished=1),
    ]
    while part := ready.generate([], 0, min_finished=2):
        parts.append(part)
    assert [len(part["sample_index"]) for part in parts[:2]] != [6, 9]
    assert len(parts) > 2
    joined = concat(parts)
    joined = select(joined, joined["sample_index"].argsort())
    # bfloat16 products round differently in batches of other sizes.
    torch.testing.assert_close(joined.pop("logprobs"), whole.pop("logprobs"), atol=0.02, rtol=0)
    for key in whole.keys() - {"no_padded_query_ids"}:
        same = torch.equal if isinstance(whole[key], torch.Tensor) else list.__eq__
        assert same(whole[key], joined[key]), key
    assert ready.engine.requests == ()


def test_a_request_that_is_gone_is_an_error_and_no_endless_wait(ready, monkeypatch) -> None:
    def add_and_abort(data, is_eval=False):
        ready._add_request_internal(data["prompt"], data["input_ids"], is_eval=is_eval)
        ready.engine._engine.abort_request([ready.engine.requests[-1]])

    monkeypatch.setattr(ready, "_add_request", add_and_abort)
    with pytest.raises(RuntimeError, match=r"dropped requests without an answer: \['3'\]"):
        ready.generate([0, 1], first_sample=0)
    assert ready.engine.requests == ()


def test_a_prompt_that_add_request_leaves_out_is_an_error(ready, monkeypatch) -> None:
    def without_the_last(data, is_eval=False):
        ready._add_request_internal(data["prompt"][:-1], data["input_ids"][:-1], is_eval=is_eval)

    monkeypatch.setattr(ready, "_add_request", without_the_last)
    with pytest.raises(ValueError, match=r"_add_request\(\) added 2 requests for 3 prompts"):
        ready.generate([0, 1, 2], first_sample=0)
    assert ready.engine.requests == ()


def test_prompts_may_be_added_one_by_one_and_none_too_often(ready, monkeypatch) -> None:
    at_once = ready.generate([0, 1, 2], first_sample=0)

    def one_by_one(data, is_eval=False):
        for prompt, ids in zip(data["prompt"], data["input_ids"], strict=True):
            ready._add_request_internal([prompt], [ids], is_eval=is_eval)

    monkeypatch.setattr(ready, "_add_request", one_by_one)
    single = ready.generate([0, 1, 2], first_sample=0)
    for key in ("all_tokens", "logprobs", "sample_index"):
        assert torch.equal(single[key], at_once[key])

    def twice(data, is_eval=False):
        one_by_one(data, is_eval)
        one_by_one(data, is_eval)

    monkeypatch.setattr(ready, "_add_request", twice)
    with pytest.raises(ValueError, match=r"_add_request\(\) adds more requests than it got pr"):
        ready.generate([0, 1, 2], first_sample=0)
    assert ready.engine.requests == ()


def test_generating_leaves_the_process_random_generators_alone(ready) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    ready.generate([0], first_sample=0)
    assert torch.equal(torch.rand(3), want)


def test_new_weights_answer_at_once_and_not_from_the_prefix_cache(ready, hf_model) -> None:
    before = ready.generate([3], first_sample=0)
    changed = copy.deepcopy(hf_model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.3)
    num_bytes = put_weights(ready, changed, version=2)
    assert num_bytes == 4 * sum(p.numel() for p in changed.parameters())
    after = ready.generate([3], first_sample=0)
    assert after["weight_version"].tolist() == [2, 2, 2]
    assert not torch.allclose(before["logprobs"], after["logprobs"], atol=1e-2)
    for row in range(3):
        mask = after["loss_mask"][row, 1:] == 1
        length = int(mask.nonzero().max()) + 2
        want = hf_logprobs(changed, after["all_tokens"][row, :length], temperature=0.7)
        got = after["logprobs"][row, : length - 1]
        assert torch.allclose(got[mask[: length - 1]], want[mask[: length - 1]], atol=1e-4)


def test_states_follow_sleep_wake_and_sync(ready, hf_model) -> None:
    assert ready.engine_state() == "READY(1)"
    ready.sleep()
    assert ready.engine_state() == "ASLEEP without KV cache"
    with pytest.raises(EngineStateError, match="ASLEEP.*must be READY"):
        ready.generate([0], first_sample=0)
    with pytest.raises(EngineStateError, match="cannot write weights"):
        put_weights(ready, hf_model, version=2)
    ready.wake_weights()
    assert ready.engine_state() == "EMPTY without KV cache"
    with pytest.raises(EngineStateError, match="EMPTY"):
        ready.generate([0], first_sample=0)
    put_weights(ready, hf_model, version=2)
    with pytest.raises(EngineStateError, match=r"READY\(2\) without KV cache"):
        ready.generate([0], first_sample=0)
    ready.wake_kv_cache()
    assert ready.engine_state() == "READY(2)"
    assert ready.generate([0], first_sample=0)["weight_version"].tolist() == [2] * 3


def test_sleep_level_1_keeps_the_weights_without_a_sync(ready, monkeypatch) -> None:
    before = ready.generate([0], first_sample=0)
    change_model_args(monkeypatch, ready, sleep_level=1)
    ready.sleep()
    ready.wake_weights()
    assert ready.engine_state() == "READY(1) without KV cache"
    ready.wake_kv_cache()
    after = ready.generate([0], first_sample=0)
    assert after["weight_version"].tolist() == [1] * 3
    assert torch.equal(after["all_tokens"], before["all_tokens"])


def test_a_sync_that_fails_leaves_the_engine_stale(ready, hf_model) -> None:
    export = {"no": "export"}
    with pytest.raises(AttributeError):
        ready.import_weights((0,), False, None, export)
    assert ready.engine_state() == "STALE(1)"
    with pytest.raises(EngineStateError, match=r"STALE\(1\)"):
        ready.generate([0], first_sample=0)
    put_weights(ready, hf_model, version=2)
    assert ready.engine_state() == "READY(2)"


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ("raise", KeyError, "my own bug"),
        ("raise late", KeyError, "my own bug"),
        ("skip", RuntimeError, r"VLLMPolicyInference.forward_step\(\) did not call"),
        ("drop", RuntimeError, "must return what self.execute_step"),
    ],
)
def test_a_broken_forward_step_is_named_and_the_engine_stays_usable(
    ready, how, error, match
) -> None:
    want = ready.generate([0], first_sample=0)
    held = ready.engine._engine.collective_rpc(requests_of_the_model)
    ready.misbehave = how
    with pytest.raises(error, match=match):
        ready.generate([0, 1], first_sample=0)
    ready.misbehave = None
    assert torch.equal(ready.generate([0], first_sample=0)["all_tokens"], want["all_tokens"])
    # All but the last, whose end comes with the next step, have given their places back.
    assert ready.engine._engine.collective_rpc(requests_of_the_model) == held


def requests_of_the_model(worker):
    return len(worker.model_runner.requests)


def test_full_collections_leave_out_the_engine_and_do_not_interrupt_a_rollout(ready) -> None:
    steps_before = []

    def note(phase, info):
        if info["generation"] == 2:
            steps_before.append(len(ready.steps))

    gc.collect()
    assert gc.get_freeze_count() > 10 * len(gc.get_objects())
    thresholds = gc.get_threshold()
    gc.callbacks.append(note)
    try:
        gc.set_threshold(1, 1, 1)
        ready.generate([0, 1], first_sample=0)
        assert gc.get_threshold() == (1, 1, 1)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(note)
    assert set(steps_before) - {0} == {len(ready.steps)}  # after the last step, perhaps before any


def test_rollouts_without_logprobs_are_told_once(ready, caplog) -> None:
    ready.misbehave = "drop logprobs"
    for _ in range(2):
        assert "logprobs" not in ready.generate([0], first_sample=0)
    (told,) = [record.message for record in caplog.records if "logprobs" in record.message]
    assert "VLLMPolicyInference.decode_internal() made has no `logprobs`" in told


def test_a_prompt_without_room_for_a_response_is_refused(ready) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has 96 tokens.*seq_length=96"):
        ready.build_prompts(["a", "b" * 96])
        ready._datasets[False].prompts_ids[1]["input_ids"] = [5] * SEQ_LENGTH
        ready.generate([0, 1], first_sample=0)
    ready.build_prompts(PROMPTS)
    assert len(ready.generate([0], first_sample=0)["all_tokens"]) == 3


def test_maps_of_a_yaml_file_constrain_responses(ready) -> None:
    engine, keys = ready.engine, {"max_tokens": 12, "seed": 0, "logprobs": 0}
    digits = {"structured_outputs": {"regex": "[0-9]{3}"}, "n": 2}
    engine.add_request("digits", None, [5, 6], keys | digits)
    repeating = {"allowed_token_ids": [9], "repetition_detection": {"max_pattern_size": 1}}
    repeating["repetition_detection"]["min_count"] = 4
    engine.add_request("repeating", None, [5, 6], keys | repeating)
    constrained, ended = engine.run()
    for one in constrained.outputs:
        assert one.text.isdecimal() and len(one.text) == 3 and len(one.logprobs) == 4  # and eos
    assert ended.outputs[0].token_ids == [9] * 4


def test_execute_step_outside_of_forward_step_is_refused(ready) -> None:
    with pytest.raises(RuntimeError, match="only valid inside forward_step"):
        ready.execute_step({})


@pytest.fixture
def partial(ready, monkeypatch):
    """The policy in a job with partial rollouts."""
    runtime = ready.runtime_args.model_copy(update={"max_rollout_round": 3})
    monkeypatch.setattr(ready, "job", ready.job.model_copy(update={"runtime": runtime}))
    return ready


def test_a_response_that_was_cut_goes_on_with_later_weights(partial, hf_model) -> None:
    assert partial.generate([0, 3, 1], 30, min_finished=3, max_steps=4) is None
    cut = partial.cut()
    assert partial.engine.requests == ()
    assert [(one.prompt_index, one.first_sample) for one in cut] == [(0, 30), (3, 33), (1, 36)]
    lengths = [len(begun.token_ids) for one in cut for begun in one.responses]
    assert 0 < max(lengths) <= 4
    earlier = [list(begun.token_ids) for one in cut for begun in one.responses]
    stored = [Carried.from_state_dict(json.loads(json.dumps(one.state_dict()))) for one in cut]

    other = copy.deepcopy(hf_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    put_weights(partial, other, version=5)
    batch = partial.generate([2], 60, carried=stored)

    check_batch({key: value for key, value in batch.items() if key != "begun"}, SEQ_LENGTH)
    assert batch["prompt_index"].tolist() == [0] * 3 + [3] * 3 + [1] * 3 + [2] * 3
    assert batch["sample_index"].tolist() == [*range(30, 39), 60, 61, 62]
    assert batch["weight_version"].tolist() == [5] * 12
    decode = partial.tokenizer.tokenizer.decode
    for row in range(12):
        tokens = response(batch, row)
        old = earlier[row] if row < 9 else []
        assert tokens[: len(old)].tolist() == old
        versions = batch["token_versions"][row][batch["loss_mask"][row, 1:] == 1]
        assert versions.tolist() == [1] * len(old) + [5] * (len(tokens) - len(old))
        assert (batch["token_versions"][row][batch["loss_mask"][row, 1:] == 0] == -1).all()
        assert decode(tokens, skip_special_tokens=True).startswith(batch["str_outputs"][row])
        # Each token's log-probability is that of the weights that sampled it.
        length = len(batch["no_padded_query_ids"][row])
        end = length + len(tokens)
        for model, part in ((hf_model, slice(0, len(old))), (other, slice(len(old), None))):
            want = hf_logprobs(model, batch["all_tokens"][row, :end], 0.7)[length - 1 :]
            got = batch["logprobs"][row, length - 1 : end - 1]
            torch.testing.assert_close(got[part], want[part], atol=0.15, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"skip_special_tokens": False},
        {"sampling_args": {"stop_token_ids": [*range(3, 60)]}},
        {"sampling_args": {"stop_token_ids": [*range(3, 60)], "include_stop_str_in_output": True}},
        {"stop": ["e", "1", "ab"]},
    ],
    ids=str,
)
def test_partial_rollouts_say_what_whole_ones_say(ready, monkeypatch, sampling) -> None:
    args = ready.model_args.model_copy(update=sampling | {"max_new_tokens": 24})
    monkeypatch.setattr(type(ready), "model_args", args)
    whole = ready.generate([0, 1, 2, 3], first_sample=30)
    runtime = ready.runtime_args.model_copy(update={"max_rollout_round": 2})
    monkeypatch.setattr(ready, "job", ready.job.model_copy(update={"runtime": runtime}))
    parts = ready.generate([0, 1, 2, 3], first_sample=30)
    assert torch.equal(whole["all_tokens"], parts["all_tokens"])
    assert whole["str_outputs"] == parts["str_outputs"]


def test_tokens_of_partial_rollouts_have_versions_without_logprobs_too(partial) -> None:
    partial.misbehave = "drop logprobs"
    batch = partial.generate([0, 1], first_sample=0)
    assert "logprobs" not in batch
    is_response = batch["loss_mask"][:, 1:] == 1
    assert (batch["token_versions"] == torch.where(is_response, 1, -1)).all()


def test_a_prompt_that_vllm_refuses_leaves_nothing_of_a_partial_request(ready) -> None:
    sampling = {"n": 1, "max_tokens": 4, "seed": 1}
    too_long = PartialRequest("x", None, [5] * 2 * SEQ_LENGTH, sampling, [Begun()])
    with pytest.raises(ValueError, match="request x#0: "):
        ready.engine.add_partial_request(too_long)
    assert ready.engine.requests == ()
    assert ready.generate([0], first_sample=0)["sample_index"].tolist() == [0, 1, 2]


def test_partial_rollouts_that_are_not_cut_give_the_samples_of_whole_ones(
    ready, monkeypatch
) -> None:
    whole = ready.generate([0, 3], first_sample=30)
    runtime = ready.runtime_args.model_copy(update={"max_rollout_round": 2})
    monkeypatch.setattr(ready, "job", ready.job.model_copy(update={"runtime": runtime}))
    parts = ready.generate([0, 3], first_sample=30)
    assert torch.equal(whole["all_tokens"], parts["all_tokens"])
    assert torch.equal(whole["logprobs"], parts["logprobs"])
    assert whole["str_outputs"] == parts["str_outputs"]
    finished = [begun.finish_reason for begun in parts["begun"]]
    assert set(finished) <= {"stop", "length"}

    # What is finished already is only handed back.
    carried = [Carried(0, 30, 1, parts["begun"][:3]), Carried(3, 33, 1, parts["begun"][3:])]
    ready.steps.clear()
    again = ready.generate([], 0, carried=carried)
    assert ready.steps == []
    assert torch.equal(again["all_tokens"], parts["all_tokens"])
