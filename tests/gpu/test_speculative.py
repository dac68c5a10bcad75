"""Do drafts and quantised weights work on CUDA, with graphs, sleep level 2 and weight syncs?

vLLM's allocator of sleeping memory serves one engine per process, so each test has a process.
"""

import os

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.conftest import LLAMA_100M
from tests.helpers.draft_ranks import FOUR_TOKENS, save_eagle_head, save_eagle_head_of_four
from tests.helpers.ranks import Ranks
from tests.helpers.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.gpu

PROMPTS = ["12+34=", "ab" * 20, "The sum of 1 and 2 is", "x y z" * 8]
NGRAM = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, one that it was trained into, a draft that agrees mostly, two EAGLE heads."""
    root = tmp_path_factory.mktemp("models")
    (root / "model").mkdir()
    model = save_tiny_llama(root / "model", **LLAMA_100M)
    for name, noise in (("trained", 0.5), ("draft", 0.02)):
        (root / name).mkdir()
        torch.manual_seed(len(name))
        other = save_tiny_llama(root / name, **LLAMA_100M)
        with torch.no_grad():
            for mine, its in zip(other.parameters(), model.parameters(), strict=True):
                mine.copy_(its + noise * its.std() * torch.randn_like(its))
        other.save_pretrained(root / name)
    (root / "eagle").mkdir()
    save_eagle_head(root / "eagle", **LLAMA_100M)
    (root / "eagle_of_four").mkdir()
    save_eagle_head_of_four(root / "eagle_of_four", model, **LLAMA_100M)
    return root


@pytest.fixture
def rank():
    group = Ranks(1)
    yield lambda function, *args: group.run(function, *args)[0]
    group.close()


def build(root, job_dir, model_args):
    """On a rank: a policy with `model_args` and the model's weights."""
    from transformers import LlamaForCausalLM

    from tests.helpers.documented_policy import VLLMPolicyInference
    from tests.helpers.engines import policy_job, put_weights, start_policy

    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    job_dir.mkdir()
    settings = dict(
        n=4, temperature=0.9, eval_temperature=0.0, gpu_memory_utilization=0.2, max_num_seqs=64,
        max_new_tokens=48, ignore_eos=True, speculative_min_gain=0.0,
    )  # fmt: skip
    job = policy_job(job_dir, root / "model", **(settings | model_args))
    module = start_policy(VLLMPolicyInference, job)
    module.build_prompts(PROMPTS)
    module.build_prompts(PROMPTS, is_eval=True)
    models = {
        name: LlamaForCausalLM.from_pretrained(root / name, dtype=torch.bfloat16).cuda().eval()
        for name in ("model", "trained")
    }
    put_weights(module, models["model"], version=1)
    return module, models


def greedy(module):
    """Responses, and what drafting did for them."""
    if module.engine.speculation is not None:
        module.take_speculation_stats()
    batch = module.generate([0, 1, 2, 3], first_sample=0, is_eval=True)
    stats = module.take_speculation_stats() if module.engine.speculation is not None else None
    return batch, stats


def regret(model, batch):
    """How much less probable than the model's best tokens greedy responses are, mean nats."""
    differences = []
    for tokens, loss_mask in zip(batch["all_tokens"], batch["loss_mask"], strict=True):
        with torch.no_grad():
            logprobs = model(tokens[None].cuda()).logits[0, :-1].float().log_softmax(-1)
        taken = logprobs.gather(1, tokens[1:, None].cuda())[:, 0]
        differences.append((logprobs.amax(-1) - taken)[loss_mask[1:].cuda() == 1])
    return torch.cat(differences).mean().item()


def share_of_same_tokens(batch, other):
    """Of two batches of greedy responses to the same prompts."""
    sampled = batch["loss_mask"] == 1
    return (batch["all_tokens"] == other["all_tokens"])[sampled].float().mean().item()


def logprob_error(module, model):
    """Mean error of the log-probabilities of sampled responses."""
    batch = module.generate([0, 1, 2, 3] * 4, first_sample=0)
    differences = []
    for row in range(len(batch["all_tokens"])):
        mask = batch["loss_mask"][row, 1:] == 1
        tokens = batch["all_tokens"][row, : int(mask.nonzero().max()) + 2]
        with torch.no_grad():
            logits = model(tokens[None].cuda()).logits[0].float() / 0.9
        want = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None].cuda())[:, 0].cpu()
        mask = mask[: len(want)]
        differences.append((batch["logprobs"][row, : len(want)] - want).abs()[mask])
    return torch.cat(differences).mean().item()


def eagle_head_error(module, root):
    """Largest difference between the weights that draft and those of the head's file."""
    stored = load_file(root / "eagle" / "model.safetensors")
    live = module.engine.draft.parameters()
    return max(
        (tensor.cpu() - stored[key].to(tensor.dtype)).abs().max().item()
        for key in ("fc.weight", "layers.0.mlp.down_proj.weight")
        for name, tensor in live.items()
        if name.endswith(key.removeprefix("layers.0."))
    )


def drafts_through_sleep_and_sync(root, job_dir, model_args):
    """On a rank: what a drafting policy answers, before and after."""
    from tests.helpers.engines import put_weights

    facts = {}
    module, models = build(root, job_dir, model_args)
    batch, stats = greedy(module)
    facts["regret"] = regret(models["model"], batch)
    facts["rate"] = stats.acceptance_rate
    facts["logprob_error"] = logprob_error(module, models["model"])
    has_head = model_args["speculative_config"]["method"] == "eagle"
    facts["head_errors"] = [eagle_head_error(module, root)] if has_head else []
    module.sleep()
    module.wake_weights()
    put_weights(module, models["model"], version=2)
    facts["head_errors"] += [eagle_head_error(module, root)] if has_head else []
    module.wake_kv_cache()
    again, stats = greedy(module)
    facts["same"] = share_of_same_tokens(batch, again)
    facts["rate_after_sleep"] = stats.acceptance_rate
    put_weights(module, models["trained"], version=3)
    trained, stats = greedy(module)
    facts["regret_of_trained"] = regret(models["trained"], trained)
    facts["num_drafts_of_trained"] = stats.num_drafts
    if model_args["speculative_config"]["method"] == "ngram_gpu":
        with pytest.raises(ValueError, match="cannot be switched off"):
            module.set_speculation(False)
    else:
        module.set_speculation(False)
        plain, stats = greedy(module)
        facts["regret_without"] = regret(models["trained"], plain)
        facts["num_drafts_without"] = stats.num_drafts
        module.set_speculation(True)
    _, stats = greedy(module)
    facts["num_drafts_again"] = stats.num_drafts
    module.shutdown()
    return facts


@pytest.mark.parametrize(
    ("method", "engine_args"),
    [
        ("ngram", {}),
        ("ngram_gpu", {}),
        ("draft_model", {"async_scheduling": False}),
        ("draft_model", {"async_scheduling": True}),
        ("eagle", {}),
    ],
)
def test_drafts_outlive_sleep_level_2_and_a_sync(rank, root, tmp_path, method, engine_args) -> None:
    config = NGRAM | {"method": method}
    if not method.startswith("ngram"):
        draft = root / {"draft_model": "draft", "eagle": "eagle"}[method]
        config = {"method": method, "model": str(draft), "num_speculative_tokens": 3}
    model_args = engine_args | {"speculative_config": config}
    facts = rank(drafts_through_sleep_and_sync, root, tmp_path / "job", model_args)
    # bf16 products round differently in batches of other shapes, and a near tie falls either way.
    assert facts["regret"] < 0.01
    assert facts["regret_of_trained"] < 0.01
    assert facts.get("regret_without", 0.0) < 0.01
    assert facts["logprob_error"] < 0.0176
    assert facts["head_errors"] == [0, 0] * (method == "eagle")
    assert facts["same"] > 0.9
    assert abs(facts["rate_after_sleep"] - facts["rate"]) < 0.1
    assert facts["num_drafts_of_trained"] > 20
    assert facts.get("num_drafts_without", 0) == 0
    assert facts["num_drafts_again"] > 20
    if method == "draft_model":
        assert facts["rate"] > 0.3


def drawn(root, job_dir, model_args, sampling):
    """On a rank: how likely what it draws is, by the chi-square test, and what drafting did."""
    from tests.helpers import draft_ranks

    module, models = build(
        root, job_dir, {"enforce_eager": True, "max_num_seqs": 512, **model_args}
    )
    draft_ranks.adopt("policy", module, models["model"].float().cpu())
    prompt = [*FOUR_TOKENS, 31, 30, 33, 32, 30, 32]
    sampling = {"temperature": 1.5, **sampling}
    return draft_ranks.distribution_p_value("policy", prompt, sampling, 4000, False)


@pytest.mark.parametrize(
    ("drafts", "async_scheduling"),
    [
        ("greedy", False), ("greedy", True), ("probabilistic", False), ("probabilistic", True),
        ("eagle", False), ("eagle", True), ("eagle that draws", True), ("ngram", False),
        ("ngram_gpu", True),
    ],
)  # fmt: skip
def test_drafts_do_not_change_what_is_drawn_how_often(
    rank, root, tmp_path, drafts, async_scheduling
) -> None:
    sampling = {"top_k": 4}
    if drafts in ("greedy", "probabilistic"):
        config = {
            "method": "draft_model",
            "model": str(root / "draft"),
            "num_speculative_tokens": 3,
        }
        config["draft_sample_method"] = drafts
    else:
        config = NGRAM | {"method": drafts}
        if drafts.startswith("eagle"):
            model = str(root / "eagle_of_four")
            config = {"method": "eagle", "model": model, "num_speculative_tokens": 3}
            config["draft_sample_method"] = "probabilistic" if "draws" in drafts else "greedy"
        sampling = {"allowed_token_ids": FOUR_TOKENS}
    model_args = {"speculative_config": config, "async_scheduling": async_scheduling}
    p_value, stats = rank(drawn, root, tmp_path / "job", model_args, sampling)
    assert p_value > 1e-4  # a right engine is found odd once in so many tests
    assert 0.01 < stats.acceptance_rate < 0.99


def fp8_syncs(root, job_dir):
    """On a rank: how far a policy with fp8 weights is from the model, after several syncs."""
    from tests.helpers.engines import put_weights

    module, models = build(root, job_dir, {"quantization": "fp8"})
    facts = {"path": module._weights.reason, "is_direct": module._weights.is_direct}
    facts["error"] = logprob_error(module, models["model"])
    facts["error_of_other"] = logprob_error(module, models["trained"])
    put_weights(module, models["trained"], version=2)
    facts["error_after_sync"] = logprob_error(module, models["trained"])
    module.sleep()
    module.wake_weights()
    put_weights(module, models["model"], version=3)
    module.wake_kv_cache()
    facts["error_after_sleep"] = logprob_error(module, models["model"])
    module.shutdown()
    return facts


def test_fp8_weights_are_quantised_again_at_each_sync(rank, root, tmp_path) -> None:
    facts = rank(fp8_syncs, root, tmp_path / "job")
    assert not facts["is_direct"] and "is quantised" in facts["path"]
    for name in ("error", "error_after_sync", "error_after_sleep"):
        assert facts[name] < 0.1, name
        assert facts[name] < 0.5 * facts["error_of_other"], name
