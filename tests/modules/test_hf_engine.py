"""Does a policy generate with Transformers as it does with vLLM?

One engine of each kind, with equal weights, serves this file.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatlearn_vllm import GRPOEngine, VLLMModule, load_config
from chatlearn_vllm.config import ConfigError
from chatlearn_vllm.engines.generation_engine import EngineStateError
from examples.megatron.models.policy_trainer import PolicyTrainer
from tests.helpers.engines import (
    SEQ_LENGTH,
    change_model_args,
    policy_job,
    put_weights,
    start_policy,
)
from tests.helpers.job_modules import CountingPolicy, DigitReward
from tests.helpers.tiny_llama import save_tiny_llama
from tests.helpers.tiny_moe import save_tiny_moe
from tests.jobs.test_grpo_job import PROMPTS as RECORDS
from tests.jobs.test_grpo_job import write_job

ROOT = Path(__file__).parents[2]
MODEL_EOS = 26
"""A second end-of-sequence token, of generation_config.json alone."""
PROMPTS = ["12+34=", "a", "The sum of 1 and 2 is"]


class Policy(VLLMModule):
    """Passes everything on, and notes its steps."""

    batches: list[list[tuple[str, int]]]
    skips = False

    def setup(self):
        self.batches = []
        super().setup()

    def model_provider(self):
        pass  # as in ChatLearn's skeleton of a policy

    def build_dataset(self, train_prompts, is_eval=False):
        return super().build_dataset(train_prompts, is_eval)

    def _add_request(self, data, is_eval=False):
        return super()._add_request(data, is_eval)

    def forward_step(self, data, iteration=0):
        requests = data["seq_group_metadata_list"]
        self.batches.append([(one.request_id, one.token_chunk_size) for one in requests])
        assert all(one.is_prompt and one.num_computed_tokens == 0 for one in requests)
        return None if self.skips else self.execute_step(data)

    def decode_internal(self, batched_outputs):
        return super().decode_internal(batched_outputs)


class VLLMPolicy(Policy):
    """The same without a look at the steps."""

    def forward_step(self, data, iteration=0):
        return self.execute_step(data)


SETTINGS = dict(n=3, temperature=0.7, eval_temperature=0.0, stop_token_list="~;@")


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model = save_tiny_llama(directory)
    model.generation_config.eos_token_id = [2, MODEL_EOS]
    model.generation_config.save_pretrained(directory)
    model.directory = directory
    return model


def start(cls, tmp_path_factory, model_dir, **model_args):
    module = start_policy(cls, policy_job(tmp_path_factory.mktemp("job"), model_dir, **model_args))
    module.build_prompts(PROMPTS)
    module.build_prompts(PROMPTS, is_eval=True)
    return module


@pytest.fixture(scope="module")
def with_vllm(hf_model, tmp_path_factory):
    module = start(VLLMPolicy, tmp_path_factory, hf_model.directory, max_logprobs=100, **SETTINGS)
    put_weights(module, hf_model, version=1)
    return module


@pytest.fixture(scope="module")
def with_hf(hf_model, tmp_path_factory):
    settings = SETTINGS | {"inference_engine": "transformers"}
    return start(Policy, tmp_path_factory, hf_model.directory, **settings)


@pytest.fixture
def ready(with_hf, hf_model):
    with_hf.skips = False
    with_hf.wake_weights()
    put_weights(with_hf, hf_model, version=1)
    with_hf.wake_kv_cache()
    with_hf.batches.clear()
    return with_hf


def ask(module, requests, number=1):
    """Answers of a module's engine to (prompt ids, sampling keys)."""
    for row, (ids, sampling) in enumerate(requests):
        module.engine.add_request(str(row), f"text {row}", ids, {"n": number} | sampling)
    return module.engine.run()


def parts(output):
    """What an answer consists of, but for its numbers."""
    return (
        output.request_id, output.prompt, list(output.prompt_token_ids), output.finished,
        [
            (made.index, made.text, list(made.token_ids), made.finish_reason, made.stop_reason)
            for made in output.outputs
        ],
    )  # fmt: skip


def assert_same_logprobs(got, expected) -> None:
    """Equal tokens and ranks at each place, and log-probabilities to 1e-4."""
    assert (got is None) == (expected is None)
    for mine, theirs in zip(got or (), expected or (), strict=True):
        if not theirs:  # a prompt's first token: None, or empty in vLLM's flat form
            assert not mine
            continue
        assert {token: one.rank for token, one in mine.items()} == {
            token: one.rank for token, one in theirs.items()
        }
        for token, one in mine.items():
            assert one.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


IDS = [[5, 6, 7, 8], [20, 21], [30, 31, 32, 33, 34, 35, 36]]
GREEDY = {
    "plain": {},
    "best tokens besides": {"logprobs": 3, "prompt_logprobs": 2},
    "without eos": {"ignore_eos": True, "prompt_logprobs": 0},
    "penalties": {
        "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3, "logprobs": 2,
    },
    "negative penalties": {"frequency_penalty": -1.5, "repetition_penalty": 0.7},
    "stop string": {"stop": ["Z", "*@", ")h"]},
    "stop string kept": {"stop": [")h", "@*"], "include_stop_str_in_output": True},
    "stop token": {"stop_token_ids": [75, 16]},
    "stop token kept": {"stop_token_ids": [75, 16], "include_stop_str_in_output": True},
    "not so soon": {"stop_token_ids": [12, 75, 16], "stop": ["h"], "min_tokens": 5},
    "eos made probable": {"logit_bias": {2: 9.0}},
    "eos made probable and ignored": {"logit_bias": {2: 9.0}, "ignore_eos": True},
    "special tokens shown": {"logit_bias": {2: 9.0, 0: 9.0}, "skip_special_tokens": False},
    "few tokens": {"allowed_token_ids": [5, 6, 70, 71, 72], "logprobs": 2},
    "one token": {"max_tokens": 1},
}  # fmt: skip


def test_greedy_answers_are_those_of_vllm(ready, with_vllm) -> None:
    reasons = set()
    for name, keys in GREEDY.items():
        requests = [
            (ids, {"temperature": 0.0, "max_tokens": 9, "logprobs": 0} | keys) for ids in IDS
        ]
        answers, expected = ask(ready, requests), ask(with_vllm, requests)
        for got, want in zip(answers, expected, strict=True):
            assert parts(got) == parts(want), name
            reasons |= {(made.finish_reason, made.stop_reason) for made in got.outputs}
            assert_same_logprobs(got.prompt_logprobs, want.prompt_logprobs)
            for made, theirs in zip(got.outputs, want.outputs, strict=True):
                assert_same_logprobs(made.logprobs, theirs.logprobs)
                total = theirs.cumulative_logprob
                assert made.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert reasons >= {("stop", None), ("stop", MODEL_EOS), ("stop", 75), ("length", None)}
    assert any(isinstance(reason, str) for _, reason in reasons)


def test_an_evaluation_gives_the_same_batch(ready, with_vllm) -> None:
    got = ready.generate([0, 1, 2], first_sample=0, is_eval=True)
    expected = with_vllm.generate([0, 1, 2], first_sample=0, is_eval=True)
    assert got.keys() == expected.keys()
    assert torch.equal(got["all_tokens"], expected["all_tokens"])
    assert torch.equal(got["loss_mask"], expected["loss_mask"])
    assert (got["logprobs"] - expected["logprobs"]).abs().max() < 1e-4
    assert got["str_outputs"] == expected["str_outputs"]


def test_a_model_provider_that_does_nothing_leaves_the_model_to_the_engine(
    ready, with_vllm
) -> None:
    for module in (ready, with_vllm):
        assert module.model is module.engine.model


def test_prompts_that_are_too_long_lose_their_beginnings_and_that_is_told(
    with_hf, monkeypatch, caplog
) -> None:
    """The default `build_dataset`: seq_length - max_new_tokens for a prompt."""
    monkeypatch.setattr(with_hf, "_datasets", {})
    args = with_hf.model_args
    room = args.seq_length - args.max_new_tokens
    long = "the head" + "9" * room
    with caplog.at_level("WARNING"):
        with_hf.build_prompts([{"prompt": long}, {"prompt": "short"}])
    item, _ = with_hf._datasets[False].data
    assert item["input_ids"] == with_hf.tokenizer.tokenizer.encode("9" * room)
    assert "policy: 1 of 2 prompts are longer than the tokens that a prompt may have" in caplog.text


def test_a_special_token_among_the_stop_strings_ends_a_response(
    ready, with_vllm, monkeypatch
) -> None:
    likely = {"stop_token_list": "~;<pad>", "sampling_args": {"logit_bias": {0: 3.0}}}
    for module in (ready, with_vllm):
        change_model_args(monkeypatch, module, **likely)
        batch = module.generate([0, 1, 2] * 4, first_sample=0)
        num_ended = 0
        for tokens, mask in zip(batch["all_tokens"], batch["loss_mask"], strict=True):
            response = tokens[mask == 1].tolist()
            num_ended += 0 in response
            assert 0 not in response[:-1]
        assert num_ended > 6
        assert not any("<pad>" in text for text in batch["str_outputs"])


@pytest.mark.parametrize(
    "keys",
    [
        {"temperature": 0.6},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 0.8, "top_p": 0.6},
        {"temperature": 0.9, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.4, "logit_bias": {70: 3.0}},
    ],
)  # fmt: skip
def test_tokens_are_drawn_from_the_distribution_of_vllm(ready, with_vllm, keys) -> None:
    size, number = 100, 1000
    whole = keys | {"max_tokens": 1, "logprobs": size, "seed": 1}
    [theirs] = ask(with_vllm, [(IDS[0], whole)])
    [mine] = ask(ready, [(IDS[0], whole)])
    expected, got = torch.zeros(size), torch.zeros(size)
    for probabilities, output in ((expected, theirs), (got, mine)):
        for token, entry in output.outputs[0].logprobs[0].items():
            probabilities[token] = torch.tensor(entry.logprob).exp()
    assert (got - expected).abs().max() < 1e-4
    assert expected.sum().item() == pytest.approx(1, abs=1e-4)

    [drawn] = ask(ready, [(IDS[0], keys | {"max_tokens": 1, "seed": 7})], number=number)
    counts = torch.zeros(size)
    for made in drawn.outputs:
        counts[made.token_ids[0]] += 1
    assert counts[expected == 0].sum() == 0
    # Chi-square over tokens expected at least five times; the rest in one bin.
    common = expected * number >= 5
    bins = torch.cat([counts[common], counts[~common].sum()[None]])
    means = torch.cat([expected[common], expected[~common].sum()[None]]) * number
    bins, means = bins[means > 0], means[means > 0]
    freedom = len(bins) - 1
    statistic = ((bins - means) ** 2 / means).sum().item()
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_log_probabilities_of_a_rollout_are_those_of_the_model(ready, hf_model) -> None:
    batch = ready.generate([0, 1, 2], first_sample=0)
    for tokens, mask, logprobs in zip(
        batch["all_tokens"], batch["loss_mask"], batch["logprobs"], strict=True
    ):
        with torch.no_grad():
            own = (hf_model(tokens[None]).logits[0] / 0.7).log_softmax(-1)[:-1]
        own = own.gather(1, tokens[1:, None])[:, 0]
        assert (own - logprobs)[mask[1:] == 1].abs().max() < 1e-4
    # Nine responses in batches of eight, each begun with its whole prompt.
    assert [len(requests) for requests in ready.batches] == [8, 1]
    assert ready.batches[1] == [("2_6", len(PROMPTS[2]))]


def test_a_response_depends_on_its_seed_and_not_on_its_batch(ready) -> None:
    batch = ready.generate([0, 1, 2], first_sample=0)
    alone = [ready.generate([row], first_sample=3 * row) for row in (2, 1, 0)][::-1]
    assert torch.equal(batch["all_tokens"], torch.cat([one["all_tokens"] for one in alone]))
    assert len({tuple(tokens.tolist()) for tokens in batch["all_tokens"]}) == 9
    keys = {"temperature": 1.0, "max_tokens": 9}
    together = ask(ready, [(IDS[0], keys | {"seed": 40})], number=3)[0].outputs
    one_by_one = ask(ready, [(IDS[0], keys | {"seed": 40 + index}) for index in range(3)])
    assert [made.token_ids for made in together] == [
        output.outputs[0].token_ids for output in one_by_one
    ]


def test_prompts_may_enter_while_others_are_answered(ready) -> None:
    whole = ready.generate([0, 1, 2], first_sample=0)
    first = ready.generate([0, 1], first_sample=0, max_steps=0)
    assert first is None
    # A batch holds eight responses: those of two prompts, and two of the third.
    some = ready.generate([2], first_sample=6, min_finished=1)
    rest = ready.generate([], first_sample=0)
    assert some["prompt_index"].tolist() == [0] * 3 + [1] * 3
    assert rest["prompt_index"].tolist() == [2] * 3
    assert torch.equal(whole["all_tokens"], torch.cat([some["all_tokens"], rest["all_tokens"]]))


def test_a_hook_that_does_not_run_its_batch_is_named_and_the_engine_stays_usable(ready) -> None:
    ready.skips = True
    with pytest.raises(RuntimeError, match=r"forward_step\(\) did not call self.execute_step"):
        ready.generate([0], first_sample=0)
    ready.skips = False
    assert ready.engine.requests == ()
    assert ready.generate([0], first_sample=0)["prompt_index"].tolist() == [0] * 3


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_the_weights_memory_back(ready, hf_model, level) -> None:
    before = ready.generate([0], first_sample=0)
    full = ready.engine.metrics()["weight_bytes"]
    assert full == sum(parameter.nbytes for parameter in hf_model.parameters())
    ready.engine.sleep(level)
    # On a CPU the host's memory is where the weights are already.
    assert ready.engine.metrics()["weight_bytes"] == (full if level == 1 else 0)
    with pytest.raises(EngineStateError, match="the engine is ASLEEP"):
        ready.generate([0], first_sample=0)
    # A sync can be planned meanwhile.
    assert ready.weight_dtypes().keys() == dict(hf_model.named_parameters()).keys()
    ready.engine.check_layouts(ready.engine.shards(1).rank_layouts(0))
    ready.wake_weights()
    assert ready.engine_state() == (
        "READY(1) without KV cache" if level == 1 else "EMPTY without KV cache"
    )
    assert ready.engine.metrics()["weight_bytes"] == full
    if level == 2:
        put_weights(ready, hf_model, version=2)
    ready.wake_kv_cache()
    assert torch.equal(ready.generate([0], first_sample=0)["all_tokens"], before["all_tokens"])


@pytest.fixture(scope="module", params=["tied", "mixtral", "qwen3_moe"])
def other_policy(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    directories = [root / "0", root / "1"]
    for seed, directory in enumerate(directories):
        if request.param == "tied":
            directory.mkdir()
            save_tiny_llama(directory, tied=True, seed=seed)
        else:
            save_tiny_moe(directory, request.param, seed=seed)
    keys = {"inference_engine": "transformers", "attn_implementation": "eager"}
    job = policy_job(root, directories[0], **keys)
    return start_policy(Policy, job), directories


def test_models_with_tied_embeddings_or_experts_take_new_weights(other_policy) -> None:
    from safetensors.torch import load_file

    from tests.helpers import rollout_ranks

    policy, directories = other_policy
    assert policy.model.config._attn_implementation == "eager"
    rollout_ranks._policy = policy
    try:
        steps = [
            (rollout_ranks.load_checkpoint, 0),
            (rollout_ranks.write_checkpoint, 1),
            (rollout_ranks.load_checkpoint, 0),
        ]
        for version, (put, number) in enumerate(steps, start=1):
            assert put(directories[number], version) == f"READY({version})"
            expected = rollout_ranks.hugging_face_answers(directories[number])
            rollout_ranks.assert_same_answers(rollout_ranks.answers(), expected)
    finally:
        rollout_ranks._policy = None
    tensors = load_file(directories[1] / "model.safetensors")
    last = max(tensors)
    with pytest.raises(ValueError, match=rf"1 tensors did not come: {last}"):
        policy.engine.load_weights(
            (name, tensor) for name, tensor in tensors.items() if name != last
        )
    assert policy.engine_state() == "STALE(3)"


def test_weights_are_read_from_disk_and_replaced_through_the_loader(hf_model, tmp_path) -> None:
    settings = {"load_format": "auto", "weight_sync_path": "load_weights"}
    settings |= {"eval_temperature": 0.0, "attn_implementation": "eager"}
    job = policy_job(tmp_path, hf_model.directory, inference_engine="transformers", **settings)
    policy = start_policy(Policy, job)
    assert policy.model.config._attn_implementation == "eager"
    policy.build_prompts(PROMPTS, is_eval=True)
    assert policy.engine_state() == "READY(0)"
    first = policy.generate([0, 1, 2], first_sample=0, is_eval=True)
    (tmp_path / "other").mkdir()
    put_weights(policy, save_tiny_llama(tmp_path / "other", seed=1), version=1)
    second = policy.generate([0, 1, 2], first_sample=0, is_eval=True)
    put_weights(policy, hf_model, version=2)
    third = policy.generate([0, 1, 2], first_sample=0, is_eval=True)
    assert not policy._weights.is_direct
    assert torch.equal(first["logprobs"], third["logprobs"])
    assert not torch.equal(first["all_tokens"], second["all_tokens"])


def test_beams_are_those_of_vllm(ready, with_vllm) -> None:
    # Of one length, and compared by log-probability: then the two definitions agree.
    keys = {
        "beam_width": 4, "n": 2, "max_tokens": 6, "length_penalty": 0.0, "ignore_eos": True,
    }  # fmt: skip
    requests = [(ids, keys) for ids in IDS]
    for got, want in zip(ask(ready, requests), ask(with_vllm, requests), strict=True):
        assert parts(got) == parts(want)
        for mine, theirs in zip(got.outputs, want.outputs, strict=True):
            assert mine.score == pytest.approx(theirs.score, abs=1e-4)
            assert mine.cumulative_logprob == pytest.approx(theirs.score, abs=1e-4)


def test_a_beam_ends_with_an_eos_of_generation_config_alone(ready, with_vllm, hf_model) -> None:
    likely = copy.deepcopy(hf_model)
    with torch.no_grad():  # nearly as probable as a token that the model likes
        likely.lm_head.weight[MODEL_EOS] = 0.9 * likely.lm_head.weight[12]
    keys = {"beam_width": 4, "n": 4, "max_tokens": 6, "length_penalty": 0.0}
    try:
        for module in (ready, with_vllm):
            put_weights(module, likely, version=1)
            outputs = ask(module, [(ids, keys) for ids in IDS])
            beams = [beam for output in outputs for beam in output.outputs]
            ended = [beam for beam in beams if MODEL_EOS in beam.token_ids]
            assert ended
            for beam in ended:
                assert beam.token_ids.index(MODEL_EOS) == len(beam.token_ids) - 1
                assert (beam.finish_reason, beam.stop_reason) == ("stop", MODEL_EOS)
    finally:
        put_weights(with_vllm, hf_model, version=1)


def test_what_transformers_cannot_do_is_refused_with_the_request(ready) -> None:
    for ids, keys, message in (
        ([5], {"bad_words": ["x"], "guided": 1}, "request x: bad_words, guided: no sampling key"),
        ([], {}, "a prompt of 0 tokens"),
        ([5] * SEQ_LENGTH, {}, f"leave room for a response in seq_length={SEQ_LENGTH}"),
        ([100], {}, "token 100 is outside the vocabulary of 100 tokens"),
        ([5], {"stop_token_ids": [-1]}, "token -1 is outside the vocabulary"),
        ([5], {"temperature": 0.0, "n": 2}, "greedy responses would all be equal"),
        ([5], {"top_p": 0.0}, "top_p=0.0 must be more than 0 and at most 1"),
        ([5], {"stop": ["x"], "detokenize": False}, "detokenize=False must be True"),
        ([5], {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ready.engine.add_request("x", None, ids, keys)
    assert ready.engine.requests == ()


def test_what_transformers_cannot_do_is_refused_before_anything_starts(hf_model, tmp_path) -> None:
    for key, value, message in (
        ("tensor_model_parallel_size", 2, "set tensor_model_parallel_size: 1, or"),
        ("bad_words", ["x"], "is none of the sampling keys of Transformers here"),
        ("hf_overrides", {"a": 1}, "has no meaning for inference_engine: transformers"),
        ("speculative_config", {"method": "ngram", "num_speculative_tokens": 2}, "vllm"),
    ):
        settings = {"inference_engine": "transformers", key: value}
        with pytest.raises(ConfigError, match=key) as refusal:
            policy_job(tmp_path, hf_model.directory, num_gpu=2, **settings)
        assert message in str(refusal.value)
        assert "inference_engine: vllm" in str(refusal.value)


def test_an_environment_variable_of_the_shipped_files_chooses_the_engine(monkeypatch) -> None:
    monkeypatch.setenv("INFERENCE_ENGINE", "transformers")
    job = load_config(ROOT / "configs/llama2/grpo.yaml")
    assert job.models["policy"].model_args.inference_engine == "transformers"
    [notice] = job.notices
    assert "no effect of gpu_memory_utilization=" in notice and "; vLLM's, and" in notice


def test_arguments_that_only_vllm_has_a_use_for_are_named_once(hf_model, tmp_path) -> None:
    settings = {"kv_cache_memory_bytes": 10**8, "trust_remote_code": True}
    job = policy_job(tmp_path, hf_model.directory, inference_engine="transformers", **settings)
    [notice] = job.notices
    assert "no effect of kv_cache_memory_bytes=100000000; vLLM's" in notice


WITHOUT_VLLM = """
import sys

class NoVLLM:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoVLLM())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "vllm" else find_spec(name, *more)
from pathlib import Path
from tests.helpers.engines import policy_job, put_weights, start_policy
from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference
import transformers

model_dir, job_dir = map(Path, sys.argv[1:])
job = policy_job(job_dir, model_dir, inference_engine="transformers", min_tokens=3)
policy = start_policy(VLLMPolicyInference, job)
put_weights(policy, transformers.AutoModelForCausalLM.from_pretrained(model_dir), version=1)
policy.build_prompts(["1+1="])
batch = policy.generate([0], first_sample=0)
assert batch["loss_mask"].sum() >= 3
assert not any(name.partition(".")[0] == "vllm" for name in sys.modules)
"""


def test_vllm_need_not_be_installed(hf_model, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_VLLM, str(hf_model.directory), str(tmp_path)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_grpo_job_learns_with_transformers(hf_model, tmp_path) -> None:
    job = write_job(
        tmp_path, hf_model.directory, policy={"inference_engine": "transformers"}, trainer={},
        colocation=["policy,policy_trainer"], enable_eval_before_training=False,
        eval_episode_interval=0,
    )  # fmt: skip
    engine = GRPOEngine(
        CountingPolicy("policy", job), None, DigitReward("reward", job),
        PolicyTrainer("policy_trainer", job),
    )  # fmt: skip
    history = engine.set_dataset(RECORDS).learn()
    assert [metrics["rollout/weight_version"] for metrics in history[1:]] == [1, 2]
    for metrics in history[1:]:
        assert metrics["train/logprob_abs_diff_max"] < 1e-3
        assert metrics["train/grad_norm"] > 0
