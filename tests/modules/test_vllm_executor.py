"""What does the seam between vLLM's scheduler and its model executor say of a batch?"""

import pytest

from chatlearn_vllm.engines.vllm_executor import SequenceGroupMetadataList, Step


def test_a_failure_of_the_model_is_raised_at_once_and_not_kept_for_later() -> None:
    def out_of_memory():
        raise MemoryError("no blocks left")

    step = Step(scheduler_output=None, execute=out_of_memory)
    with pytest.raises(MemoryError, match="no blocks left"):
        step.execute()
    assert isinstance(step.error, MemoryError) and not step.executed
    # A hook that tries again is told, and one that says nothing does not hide what happened.
    with pytest.raises(RuntimeError, match="only once"):
        step.execute()
    with pytest.raises(MemoryError, match="no blocks left"):
        step.check_done(None, "Policy.forward_step()")


@pytest.mark.parametrize(
    ("prefill", "is_prompt"),
    [(None, True), ([5, 6, 7], True), ([5, 6, 7, 8], False)],
    ids=["older runner", "newer runner", "newer runner, after a preemption"],
)
def test_a_request_that_begins_again_does_not_work_on_its_prompt(prefill, is_prompt) -> None:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    batch = SchedulerOutput.make_empty()
    new = NewRequestData(
        req_id="0", prompt_token_ids=[5, 6, 7], mm_features=[], sampling_params=None,
        pooling_params=None, block_ids=(), num_computed_tokens=2, lora_request=None,
        prefill_token_ids=prefill,
    )  # fmt: skip
    batch.scheduled_new_reqs.append(new)
    batch.num_scheduled_tokens["0"] = 1
    (request,) = SequenceGroupMetadataList(batch)
    assert request.is_prompt is is_prompt
    assert (request.request_id, request.token_chunk_size) == ("0", 1)
    assert request.num_computed_tokens == 2
