"""Does vLLM answer from quantised checkpoints?"""

import pytest
import torch

from tests.helpers import rollout_ranks
from tests.helpers.quantized_llama import save_quantized
from tests.helpers.ranks import Ranks
from tests.helpers.tiny_llama import save_tiny_llama


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(1)
    yield group
    group.close()


def engine_facts() -> tuple[str, str, str | None]:
    """On a rank: state and dtype, and what may become of a weight sync."""
    engine = rollout_ranks.policy().engine
    return str(engine.state), str(engine.dtype), engine.direct_copy_problem()


@pytest.mark.parametrize(("method", "key"), [("awq", "awq"), ("gptq", "gptq"), ("gptq", None)])
def test_a_frozen_model_answers_from_its_quantised_checkpoint(ranks, tmp_path, method, key) -> None:
    (tmp_path / "model").mkdir()
    model = save_quantized(tmp_path / "model", method)
    ranks.run(
        rollout_ranks.build, tmp_path / "job", tmp_path / "model", 1, 1,
        quantization=key, load_format="auto", dtype="half",
    )  # fmt: skip
    [(state, dtype, problem)] = ranks.run(engine_facts)
    assert (state, dtype) == ("READY(0)", "torch.bfloat16")
    assert "is quantised" in problem
    [answers] = ranks.run(rollout_ranks.answers)
    (tmp_path / "before").mkdir()
    before = save_tiny_llama(tmp_path / "before")
    error, error_before = (logprob_error(one, answers) for one in (model, before))
    # of bfloat16; what was quantised away is in the error of the model before
    assert error < 0.05
    assert error < 0.3 * error_before
    ranks.run(rollout_ranks.drop)


def logprob_error(model, answers) -> float:
    """Mean error of the log-probabilities of some answers."""
    errors = []
    for ids, (tokens, logprobs) in zip(rollout_ranks.PROMPTS, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        errors.append((torch.tensor(logprobs) - expected).abs())
    return torch.cat(errors).mean().item()


def test_what_needs_a_gpu_is_refused_before_an_engine_is_built(ranks, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    save_tiny_llama(tmp_path / "model")
    with pytest.raises(AssertionError, match=r"models.policy: .* \(quantization\) works on GPUs"):
        ranks.run(
            rollout_ranks.build, tmp_path / "job", tmp_path / "model", 1, 1, quantization="fp8"
        )
