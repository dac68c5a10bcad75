"""Does a beam search find what vLLM's and Hugging Face's do? One vLLM engine serves this file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from chatlearn_vllm import GRPOEngine, OnlineDPOEngine, VLLMModule
from chatlearn_vllm.config import ConfigError
from chatlearn_vllm.engines.beam_search import BeamSearch, BeamSearchKeys
from chatlearn_vllm.engines.request_output import Logprob
from chatlearn_vllm.engines.vllm_arguments import engine_arguments, sampling_arguments
from chatlearn_vllm.layouts import ModelShape
from examples.megatron.models.online_dpo_trainer import OnlineDPOTrainer
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.engines import SEQ_LENGTH, policy_job, put_weights, start_policy
from tests.helpers.job_modules import CountingPolicy, DigitReward
from tests.helpers.tiny_llama import save_tiny_llama
from tests.jobs.test_grpo_job import write_job

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 6, 7, 8], [20, 21], [30, 31, 32, 33, 34, 35, 36]]
NUM_TOKENS = 7
EOS = 2


class Policy(VLLMModule):
    def model_provider(self):
        return super().model_provider()

    def build_dataset(self, train_prompts, is_eval=False):
        return super().build_dataset(train_prompts, is_eval)

    def _add_request(self, data, is_eval=False):
        return super()._add_request(data, is_eval)

    def forward_step(self, data, iteration=0):
        return super().forward_step(data, iteration)

    def decode_internal(self, batched_outputs):
        return super().decode_internal(batched_outputs)


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model = save_tiny_llama(directory)
    with torch.no_grad():  # responses of many lengths: EOS is as probable as a token that it likes
        model.lm_head.weight[EOS] = model.lm_head.weight[12]
    model.save_pretrained(directory)
    model.generation_config = GenerationConfig()  # `generate` takes what is asked for, no more
    model.directory = directory
    return model


@pytest.fixture(scope="module")
def policy(hf_model, tmp_path_factory):
    job = policy_job(
        tmp_path_factory.mktemp("job"), hf_model.directory,
        num_inference_per_prompt=2, num_beams=11, eval_num_beams=3, max_new_tokens=NUM_TOKENS,
    )  # fmt: skip
    module = start_policy(Policy, job)
    put_weights(module, hf_model, version=1)
    return module


def beams_of(policy, **keys):
    """Per prompt its beams, best first, as (tokens, log-probability, score)."""
    for row, ids in enumerate(PROMPTS):
        policy.engine.add_request(str(row), None, ids, {"max_tokens": NUM_TOKENS} | keys)
    return [
        [(list(beam.token_ids), beam.cumulative_logprob, beam.score) for beam in output.outputs]
        for output in policy.engine.run()
    ]


def hugging_face_beams(model, num_beams, length_penalty):
    """The same of `generate`, of responses that end at their limit."""
    found = []
    for ids in PROMPTS:
        config = GenerationConfig(
            num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=NUM_TOKENS,
            length_penalty=length_penalty, pad_token_id=0, return_dict_in_generate=True,
            output_scores=True, do_sample=False,
        )  # fmt: skip
        made = model.generate(torch.tensor([ids]), generation_config=config)
        steps = model.compute_transition_scores(made.sequences, made.scores, made.beam_indices)
        found.append(
            [
                (row[len(ids) :].tolist(), own.sum().item(), score.item())
                for row, own, score in zip(
                    made.sequences, steps, made.sequences_scores, strict=True
                )
            ]
        )
    return found


def assert_same_beams(got, expected) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert [tokens for tokens, *_ in mine] == [tokens for tokens, *_ in theirs]
        for (_, *numbers), (_, *wanted) in zip(mine, theirs, strict=True):
            assert numbers == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("width", [3, 11])
def test_beams_and_scores_are_those_of_hugging_face_generate(policy, hf_model, width) -> None:
    got = beams_of(policy, beam_width=width, n=width, length_penalty=0.0, ignore_eos=True)
    assert_same_beams(got, hugging_face_beams(hf_model, width, 0.0))
    # With a penalty the scores differ by what is divided by: vLLM counts the prompt, too.
    got = beams_of(policy, beam_width=width, n=width, length_penalty=2.0, ignore_eos=True)
    expected = hugging_face_beams(hf_model, width, 2.0)
    rescaled = [
        [(ids, own, score * NUM_TOKENS**2 / (len(prompt) + NUM_TOKENS) ** 2)
         for ids, own, score in beams]
        for prompt, beams in zip(PROMPTS, expected, strict=True)
    ]  # fmt: skip
    assert_same_beams(got, rescaled)


@pytest.fixture(scope="module")
def vllm_llm(policy, hf_model):
    from vllm import LLM

    return LLM(
        str(hf_model.directory), dtype="float32", enforce_eager=True, max_model_len=SEQ_LENGTH,
        kv_cache_memory_bytes=2**24, block_size=32,
    )  # fmt: skip


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.5])
def test_beams_and_scores_are_those_of_vllms_own_search(policy, vllm_llm, length_penalty) -> None:
    from vllm.entrypoints.generate.beam_search.utils import get_beam_search_score
    from vllm.sampling_params import BeamSearchParams

    keys = {"beam_width": 4, "length_penalty": length_penalty}
    params = BeamSearchParams(max_tokens=NUM_TOKENS, **keys)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    expected = [
        [
            (
                beam.tokens[len(ids) :],
                beam.cum_logprob,
                get_beam_search_score(beam.tokens, beam.cum_logprob, EOS, length_penalty),
            )
            for beam in output.sequences
        ]
        for ids, output in zip(PROMPTS, vllm_llm.beam_search(prompts, params), strict=True)
    ]
    got = beams_of(policy, n=4, **keys)
    assert_same_beams(got, expected)
    assert len({len(tokens) for beams in got for tokens, *_ in beams}) > 1
    assert any(tokens[-1] == EOS for beams in got for tokens, *_ in beams)


def test_a_stop_token_ends_a_beam_as_eos_does(policy) -> None:
    searched = {"beam_width": 3, "n": 3, "ignore_eos": True, "max_tokens": NUM_TOKENS}
    policy.engine.add_request("eos", None, PROMPTS[0], searched | {"ignore_eos": False})
    policy.engine.add_request("id", None, PROMPTS[0], searched | {"stop_token_ids": [EOS]})
    by_eos, by_id = policy.engine.run()
    assert [beam.token_ids for beam in by_eos.outputs] == [beam.token_ids for beam in by_id.outputs]
    ended = [beam for beam in by_id.outputs if beam.token_ids[-1] == EOS]
    assert ended
    assert {(beam.finish_reason, beam.stop_reason) for beam in ended} == {("stop", EOS)}
    ended = [beam for beam in by_eos.outputs if beam.token_ids[-1] == EOS]
    assert {(beam.finish_reason, beam.stop_reason) for beam in ended} == {("stop", None)}


def test_searches_and_samples_share_the_engine(policy) -> None:
    alone = beams_of(policy, beam_width=3, n=3)
    engine = policy.engine
    search = {"beam_width": 3, "n": 3, "max_tokens": NUM_TOKENS}
    sample = {"temperature": 1.0, "seed": 4, "max_tokens": 2, "logprobs": 0, "ignore_eos": True}
    for row, ids in enumerate(PROMPTS):
        engine.add_request(str(row), None, ids, search)
    engine.add_request("sample", None, PROMPTS[0], sample)
    assert [output.request_id for output in engine.run(min_finished=1)] == ["sample"]
    assert engine.requests == ("0", "1", "2")
    together = [[list(beam.token_ids) for beam in output.outputs] for output in engine.run()]
    assert together == [[tokens for tokens, *_ in beams] for beams in alone]

    engine.add_request("0", None, PROMPTS[0], search)
    engine.run(max_steps=2)
    engine.abort()
    assert engine.requests == ()
    assert beams_of(policy, beam_width=3, n=3) == alone


def test_a_rollout_gets_the_best_beams_and_an_evaluation_the_best(policy) -> None:
    policy.build_prompts(["12+34=", "ab"])
    policy.build_prompts(["12+34=", "ab"], is_eval=True)
    batch = policy.generate([0, 1], first_sample=0)
    assert batch["prompt_index"].tolist() == [0, 0, 1, 1]
    assert batch["beam_scores"].shape == (4,)
    assert (batch["beam_scores"][::2] > batch["beam_scores"][1::2]).all()
    response = batch["all_tokens"][0][batch["loss_mask"][0] == 1]
    length = len(batch["no_padded_query_ids"][0]) + len(response) - (response[-1] == EOS).item()
    score = batch["logprobs"][0].sum() / length
    assert batch["beam_scores"][0].item() == pytest.approx(score.item(), abs=1e-5)
    best = policy.generate([0, 1], first_sample=0, is_eval=True)
    assert best["beam_scores"].shape == (2,)


def test_what_a_search_cannot_do_is_refused(policy) -> None:
    for keys, message in (
        ({"n": 4}, "request x: n=4 beams of beam_width=3"),
        ({"top_p": 0.5}, "request x: top_p: no key of a beam search"),
        ({"max_tokens": 0}, "beam_width=3 and max_tokens=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling = {"beam_width": 3, "max_tokens": 5} | keys
            policy.engine.add_request("x", None, [5, 6], sampling)
    assert policy.engine.requests == ()


def test_the_best_beam_is_the_best_of_complete_and_open_ones() -> None:
    search = BeamSearch("r", None, [5, 6], BeamSearchKeys(1, 9, ignore_eos=False), [EOS])
    [(name, ids, sampling)] = search.requests()
    assert (name, ids, sampling["max_tokens"], sampling["logprobs"]) == ("r#0", [5, 6], 1, 2)
    assert search.note(name, {EOS: Logprob(-0.1), 7: Logprob(-4.0)})
    assert not search.is_finished
    assert search.open_ids == ["r#0"]
    assert search.requests()[0][1] == [5, 6, 7]
    search.note("r#0", {EOS: Logprob(-1.0), 8: Logprob(-9.0)})
    [best] = search.output(lambda ids, skip: str(ids)).outputs
    assert (best.token_ids, best.text, best.score) == ([EOS], "[]", -0.05)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_beams": 2, "n": 3}, "num_beams=2: must be at least num_inference_per_prompt x n"),
        ({"use_beam_search": True}, "use_beam_search=True: needs a width; set num_beams, or n,"),
        ({"num_beams": 2, "stop_token_list": "x"}, "does not go with num_beams: a beam ends with"),
        ({"eval_num_beams": 2, "eval_repetition_penalty": 2.0}, "must be 1 with eval_num_beams"),
        ({"n": 2, "use_beam_search": True, "min_tokens": 2}, "does not go with use_beam_search"),
        ({"num_beams": 2, "prompt_logprobs": 1}, "prompt_logprobs=1: must be None with num_beams"),
        ({"num_beams": 2, "inference_engine": "server"}, "set inference_engine: vllm"),
    ],
)  # fmt: skip
def test_keys_that_contradict_a_search_are_refused(hf_model, tmp_path, keys, message) -> None:
    with pytest.raises(ConfigError) as refusal:
        policy_job(tmp_path, hf_model.directory, **keys)
    assert message in str(refusal.value)


def test_the_older_key_searches_as_many_beams_as_responses_in_training_alone(
    hf_model, tmp_path
) -> None:
    keys = {"n": 2, "num_inference_per_prompt": 3, "use_beam_search": True}
    args = policy_job(tmp_path, hf_model.directory, **keys).models["policy"].model_args
    searched = sampling_arguments(args, is_eval=False)
    assert (searched["beam_width"], searched["n"]) == (6, 6)
    assert "beam_width" not in sampling_arguments(args, is_eval=True)


def test_a_search_in_evaluation_leaves_the_keys_of_training_alone(hf_model, tmp_path) -> None:
    keys = {"eval_num_beams": 3, "frequency_penalty": 0.5, "stop_token_ids": [9]}
    args = policy_job(tmp_path, hf_model.directory, **keys).models["policy"].model_args
    assert sampling_arguments(args, is_eval=False)["frequency_penalty"] == 0.5
    searched = sampling_arguments(args, is_eval=True)
    assert (searched["beam_width"], searched["n"], searched["stop_token_ids"]) == (3, 1, [9])
    shape = ModelShape.from_hf_config(hf_model.config.to_dict())
    for width, most in ((3, 20), (40, 80)):
        args = args.model_copy(update={"eval_num_beams": width})
        made, _ = engine_arguments(args, hf_model.directory, shape, seed=0, on_gpu=False)
        assert made["max_logprobs"] == most


def test_training_on_sampling_probabilities_refuses_beams_and_on_preferences_takes_them(
    hf_model, tmp_path
) -> None:
    job = write_job(
        tmp_path, hf_model.directory, policy={"num_beams": 4}, trainer={}, reference={}
    )  # fmt: skip
    policy, reward = CountingPolicy("policy", job), DigitReward("reward", job)
    with pytest.raises(ValueError, match="num_beams=4 searches responses, and PolicyTrainer"):
        GRPOEngine(policy, None, reward, PolicyTrainer("policy_trainer", job))
    reference = PolicyReference("reference", job)
    OnlineDPOEngine(policy, reference, reward, OnlineDPOTrainer("policy_trainer", job))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_shipped_evaluation_answers_with_the_best_beam(tmp_path, engine) -> None:
    model = save_tiny_llama(tmp_path / "model")
    questions = [{"prompt": f"{i}+{i + 7}=", "answer": str(2 * i + 7)} for i in range(10, 16)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(question) + "\n" for question in questions))
    settings = {
        "policy_load": tmp_path / "model", "eval_data_path": prompts, "num_gpu_policy": 1,
        "output_dir": tmp_path, "seq_length": 32, "max_new_tokens": 12, "max_num_seqs": 8,
        "eval_num_beams": 3, "INFERENCE_ENGINE": engine,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "chatlearn_vllm.cli.main", "launch", "configs/llama2/eval.yaml"],
        cwd=ROOT, env=os.environ | {key: str(value) for key, value in settings.items()},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "eval" / "eval" / "episode_000000.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for question, sample in zip(questions, samples, strict=True):
        ids = torch.tensor([tokenizer.encode(question["prompt"])])
        made = model.generate(
            ids, num_beams=3, max_new_tokens=12, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        response = made.sequences[0, ids.shape[1] :]
        assert sample["str_outputs"] == tokenizer.decode(response, skip_special_tokens=True)
        # What vLLM divides by counts the prompt, too.
        lengths = {"transformers": len(response), "vllm": ids.shape[1] + len(response)}
        score = made.sequences_scores.item() * len(response) / lengths[engine]
        assert sample["beam_scores"] == pytest.approx(score, abs=1e-4)
