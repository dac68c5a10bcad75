"""A policy without drafts and policies with, in one spawned rank, and what they answer.

The process is one of its own (see `Ranks`): after drafting n-grams, which imports numba, vLLM 0.32
can build no further engine on CPU in a process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from chatlearn_vllm.data.carried import Begun
from chatlearn_vllm.engines.live_model import EngineStateError
from chatlearn_vllm.engines.speculation import SpeculationStats
from chatlearn_vllm.engines.vllm_partial import PartialRequest
from chatlearn_vllm.layouts import ListedShards, ParamLayout
from chatlearn_vllm.layouts.blocks import replicated
from chatlearn_vllm.modules.policy_weights import PolicyWeights
from chatlearn_vllm.modules.receives_weights import DRAFT
from chatlearn_vllm.weight_sync.digest import EVERYTHING
from chatlearn_vllm.weight_sync.links import colocated
from chatlearn_vllm.weight_sync.sender import WeightSender
from tests.helpers.engines import policy_job, put_weights, start_policy
from tests.helpers.fault_in_copy import FaultInCopy
from tests.helpers.tiny_llama import save_tiny_llama

PROMPTS = ["12+34=", "ab" * 20, "x y z", "The sum of 1 and 2 is"]
NGRAM = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3,
}  # fmt: skip
MAX_NEW_TOKENS = 32
FOUR_TOKENS = [30, 31, 32, 33]
"""What one of the EAGLE heads proposes."""

_policies: dict[str, Any] = {}
_models: dict[str, Any] = {}


def save_models(root: Path) -> None:
    """A model, one that it was trained into, a draft that agrees mostly, two EAGLE heads."""
    for name in ("model", "trained", "draft", "eagle", "eagle_of_four", "medusa"):
        (root / name).mkdir()
    model = save_tiny_llama(root / "model", seed=0)
    torch.manual_seed(1)
    for name, noise in (("trained", 0.1), ("draft", 0.04)):
        other = save_tiny_llama(root / name, seed=0)
        with torch.no_grad():
            for mine, its in zip(other.parameters(), model.parameters(), strict=True):
                mine.copy_(its + noise * its.std() * torch.randn_like(its))
        other.save_pretrained(root / name)
    save_eagle_head(root / "eagle")
    save_eagle_head_of_four(root / "eagle_of_four", model)
    _save_medusa_heads(root / "medusa", model)


def save_eagle_head(directory: Path, **config: Any) -> None:
    """One layer that reads an embedding and a hidden state; it shares the model's embedding."""
    layer = save_tiny_llama(directory, **{**config, "num_hidden_layers": 1})
    width = layer.config.hidden_size
    head = {
        name.removeprefix("model."): tensor.clone()
        for name, tensor in layer.state_dict().items()
        if name.startswith("model.layers.") and "input_layernorm" not in name
    }
    head["fc.weight"] = torch.cat([torch.eye(width), 0.1 * torch.randn(width, width)], dim=1)
    save_file(head, directory / "model.safetensors", metadata={"format": "pt"})


def save_eagle_head_of_four(directory: Path, model: LlamaForCausalLM, **config: Any) -> None:
    """One whose layer does nothing, and which proposes the next of FOUR_TOKENS behind each."""
    save_eagle_head(directory, **config)
    head = load_file(directory / "model.safetensors")
    for name in head:
        if "o_proj" in name or "down_proj" in name:
            head[name].zero_()
    head["fc.weight"][:, model.config.hidden_size :] = 0
    output = model.lm_head.weight.detach().float().cpu()
    head["embed_tokens.weight"] = torch.zeros_like(output)
    head["embed_tokens.weight"][FOUR_TOKENS] = output[FOUR_TOKENS[1:] + FOUR_TOKENS[:1]]
    save_file(head, directory / "model.safetensors", metadata={"format": "pt"})


def _save_medusa_heads(directory: Path, model: LlamaForCausalLM) -> None:
    """Two that propose what the model finds most probable now."""
    width, vocab_size = model.config.hidden_size, model.config.vocab_size
    config = {
        "model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": width,
        "vocab_size": vocab_size, "num_heads": 2, "num_hidden_layers": 1,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    head = {}
    for number in range(2):
        head[f"blocks.{number}.layers.0.weight"] = torch.zeros(width, width)
        head[f"lm_heads.{number}.weight"] = model.lm_head.weight.detach().clone()
    save_file(head, directory / "model.safetensors", metadata={"format": "pt"})


def build(root: Path) -> None:
    """Build all policies and sync the model's weights into them; n-grams come last."""
    from tests.helpers.documented_policy import VLLMPolicyInference

    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    configs = {
        "plain": None,
        "draft_model": {
            "method": "draft_model", "model": str(root / "draft"), "num_speculative_tokens": 3,
        },
        "drawn_drafts": {
            "method": "draft_model", "model": str(root / "draft"), "num_speculative_tokens": 3,
            "draft_sample_method": "probabilistic",
        },
        **{
            name: {"method": "eagle", "model": str(root / name), "num_speculative_tokens": 2}
            for name in ("eagle", "eagle_of_four")
        },
        "medusa": {"method": "medusa", "model": str(root / "medusa"), "num_speculative_tokens": 2},
        "ngram": NGRAM,
    }  # fmt: skip
    for name in ("model", "trained"):
        _models[name] = LlamaForCausalLM.from_pretrained(root / name).eval()
    for name, config in configs.items():
        directory = root / f"job_{name}"
        directory.mkdir()
        job = policy_job(
            directory, root / "model", n=1, temperature=0.7, eval_temperature=0.0, ignore_eos=True,
            max_new_tokens=MAX_NEW_TOKENS, max_num_seqs=64, speculative_config=config,
            speculative_min_gain=0.0,
        )  # fmt: skip
        policy = start_policy(VLLMPolicyInference, job)
        policy.build_prompts(PROMPTS)
        policy.build_prompts(PROMPTS, is_eval=True)
        _policies[name] = policy
        sync(name, "model", 1)


def adopt(name: str, policy: Any, model: LlamaForCausalLM) -> None:
    """Ask a policy that was built elsewhere, whose weights are those of `model`."""
    _policies[name], _models["model"] = policy, model


def sync(name: str, model: str, version: int) -> int:
    """Put a model's weights into a policy; the bytes that were written."""
    return put_weights(_policies[name], _models[model], version)


def sync_draft(name: str, directory: Path, version: int, fault: str | None = None) -> int:
    """Send the weights of a directory to a policy's draft; the bytes that were written.

    Args:
        name: of the policy.
        directory: in Hugging Face form.
        version: of the weights.
        fault: None; "copy" fails half-way, "digest" changes the weights after they were read.
    """
    policy, tensors = _policies[name], load_file(directory / "model.safetensors")
    layouts = [replicated(own, own, tuple(tensor.shape)) for own, tensor in tensors.items()]
    sources, targets = ListedShards({0: layouts}), policy.weight_shards(1, part=DRAFT)
    links = colocated(1, 1, 1)
    sender = WeightSender(0, lambda: tensors, lambda: version)
    sender.plan(sources, targets, links, policy.weight_dtypes(part=DRAFT))
    policy.plan_weight_sync(0, sources, targets, links, part=DRAFT)
    with FaultInCopy("raise") if fault == "copy" else nullcontext():
        policy.import_weights((0,), False, EVERYTHING, sender.export(), part=DRAFT)
    if fault == "digest":
        next(iter(tensors.values())).add_(1)
    arrival = policy.finish_weight_sync(version, (0,), sender.sent(), part=DRAFT)
    assert arrival.is_good == (fault is None)
    return arrival.num_bytes


def failed_sync_of_draft(name: str, directory: Path, version: int, fault: str) -> tuple[str, ...]:
    """A sync that fails; then the draft's state, the policy's, and why it cannot generate."""
    policy = _policies[name]
    try:
        sync_draft(name, directory, version, fault)
    except RuntimeError as error:
        assert str(error) == "a copy failed"
    policy.revoke_weight_sync(version, part=DRAFT)
    return str(policy.engine.draft.state), policy.engine_state(), why_not_ready(name)


def why_not_ready(name: str) -> str:
    """Why a policy cannot generate; nothing may be left of the attempt."""
    policy = _policies[name]
    try:
        policy.generate([0], first_sample=0)
    except EngineStateError as error:
        assert policy.engine.requests == ()
        return str(error)
    return "it can"


def send_draft_through_the_loader(name: str) -> None:
    """Have the next syncs of a policy's draft pass through vLLM's loader."""
    policy = _policies[name]
    policy._draft_weights = PolicyWeights(policy.engine.draft, "load_weights")


def is_draft(name: str, directory: Path) -> bool:
    """Whether the draft's weights are a directory's, bit by bit."""
    draft = _policies[name].engine.draft
    return _holds(draft.parameters(), draft.shards(1).rank_layouts(0), directory)


def is_model(name: str, directory: Path) -> bool:
    """Whether the weights of the model that verifies are a directory's, bit by bit."""
    engine = _policies[name].engine
    return _holds(engine.parameters(), engine.shards(1).rank_layouts(0), directory)


def _holds(parameters: dict[str, Any], layouts: list[ParamLayout], directory: Path) -> bool:
    tensors = load_file(directory / "model.safetensors")
    return all(
        torch.equal(
            parameters[layout.name][tuple(slice(*bounds) for bounds in block.local)],
            tensors[block.tensor][tuple(slice(*bounds) for bounds in block.logical)],
        )
        for layout in layouts
        for block in layout.blocks
    )


def model_bytes() -> int:
    """Of the model's weights, without any draft's."""
    return sum(p.numel() * p.element_size() for p in _models["model"].parameters())


def greedy(name: str) -> tuple[list[list[int]], SpeculationStats | None]:
    """Greedy responses to all prompts, and what drafting did for them."""
    policy = _policies[name]
    take_stats(name)
    batch = policy.generate(list(range(len(PROMPTS))), first_sample=0, is_eval=True)
    return _responses(batch), take_stats(name)


def take_stats(name: str) -> SpeculationStats | None:
    """What drafting did since the last time."""
    policy = _policies[name]
    return policy.take_speculation_stats() if policy.engine.speculation is not None else None


def hugging_face_greedy(model: str) -> list[list[int]]:
    """What transformers answers."""
    prompts = _prompt_ids()
    with torch.no_grad():
        answers = [
            _models[model].generate(
                torch.tensor([ids]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
                eos_token_id=None,
            )
            for ids in prompts
        ]  # fmt: skip
    return [row[0, len(ids) :].tolist() for row, ids in zip(answers, prompts, strict=True)]


def _prompt_ids() -> list[list[int]]:
    return [item["input_ids"] for item in _policies["plain"]._datasets[True]]


def _responses(batch: dict[str, Any]) -> list[list[int]]:
    rows = zip(batch["all_tokens"], batch["loss_mask"], strict=True)
    return [tokens[mask == 1].tolist() for tokens, mask in rows]


def sample(name: str, prompt_indices: list[int], first_sample: int) -> list[list[int]]:
    """Responses drawn at the training temperature."""
    return _responses(_policies[name].generate(prompt_indices, first_sample))


def logprob_errors(name: str, sampling: dict[str, Any]) -> tuple[list[float], SpeculationStats]:
    """Largest error of the log-probabilities of each response; sampled as `sampling` says."""
    policy, model = _policies[name], _models["model"]
    take_stats(name)
    request = {"max_tokens": MAX_NEW_TOKENS, "logprobs": 0, "ignore_eos": True, **sampling}
    prompts = _prompt_ids()
    for row, ids in enumerate(prompts):
        policy.engine.add_request(str(row), None, ids, request | {"seed": row})
    errors = []
    for ids, output in zip(prompts, policy.engine.run(), strict=True):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        logprobs = restricted(logits, sampling).log()
        errors.append(
            max(
                abs(step[token].logprob - logprobs[row, token].item())
                for row, (token, step) in enumerate(zip(tokens, completion.logprobs, strict=True))
            )
        )
    return errors, take_stats(name)


def restricted(logits: torch.Tensor, sampling: dict[str, Any]) -> torch.Tensor:
    """[..., vocabulary]: the probabilities that vLLM is asked to draw from."""
    logits = logits.float()
    if allowed := sampling.get("allowed_token_ids"):
        mask = torch.full_like(logits, -torch.inf)
        mask[..., allowed] = 0
        logits = logits + mask
    logits = logits / sampling["temperature"]
    if top_k := sampling.get("top_k"):
        kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    return logits.softmax(dim=-1)


def distribution_p_value(
    name: str, prompt: list[int], sampling: dict[str, Any], num_samples: int, accept_all: bool
) -> tuple[float, SpeculationStats]:
    """How likely it is that a policy's first three tokens are the model's, by a chi-square test.

    Args:
        name: of the policy.
        prompt: token ids.
        sampling: leaves four tokens or so at each place.
        num_samples: responses that are drawn.
        accept_all: break vLLM so that it accepts every draft that is possible at all.

    Returns:
        The probability of counts as odd as those found, were they drawn from the model.
    """
    from vllm.v1.sample import rejection_sampler

    policy = _policies[name]
    take_stats(name)
    request = {"max_tokens": 4, "ignore_eos": True, "n": num_samples, "seed": 11, **sampling}
    right = rejection_sampler.generate_uniform_probs
    if accept_all:
        rejection_sampler.generate_uniform_probs = lambda *args: right(*args).zero_()
    try:
        policy.engine.add_request("0", None, prompt, request)
        [output] = policy.engine.run()
    finally:
        rejection_sampler.generate_uniform_probs = right
    expected = dict(_first_tokens(prompt, sampling, 3, 1.0))
    counts = dict.fromkeys(expected, 0)
    for completion in output.outputs:
        tokens = tuple(completion.token_ids[:3])
        if tokens not in counts:  # the model never says that
            return 0.0, take_stats(name)
        counts[tokens] += 1
    return _chi_square(counts, expected, num_samples), take_stats(name)


def _first_tokens(
    prompt: list[int], sampling: dict[str, Any], num_tokens: int, probability: float
) -> Iterator[tuple[tuple[int, ...], float]]:
    """All beginnings of a response and the model's probability of each."""
    if num_tokens == 0:
        yield (), probability
        return
    with torch.no_grad():
        logits = _models["model"](torch.tensor([prompt])).logits[0, -1]
    probabilities = restricted(logits, sampling)
    for token in probabilities.nonzero()[:, 0].tolist():
        rest = probability * probabilities[token].item()
        for tokens, whole in _first_tokens([*prompt, token], sampling, num_tokens - 1, rest):
            yield (token, *tokens), whole


def _chi_square(
    counts: dict[tuple[int, ...], int],
    expected: dict[tuple[int, ...], float],
    num_samples: int,
) -> float:
    """Of the counts, the rare ones together as one."""
    rare = {cell for cell, probability in expected.items() if probability * num_samples < 8}
    cells = [({cell}, expected[cell]) for cell in expected if cell not in rare]
    if rare:
        cells.append((rare, sum(expected[cell] for cell in rare)))
    statistic = sum(
        (sum(counts[one] for one in cell) - probability * num_samples) ** 2
        / (probability * num_samples)
        for cell, probability in cells
    )
    half_degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_degrees, torch.tensor(statistic / 2).double()).item()


def sleep_and_lose_the_weights(name: str) -> int:
    """Sleep at level 2; the draft's memory then holds something else, as it does on a GPU.

    Returns:
        Bytes of the draft that are kept in host memory.
    """
    from chatlearn_vllm.engines import vllm_compat

    policy = _policies[name]
    policy.sleep()
    draft = vllm_compat.draft_model(policy.engine._engine)
    with torch.no_grad():
        for parameter in draft.parameters() if draft is not None else ():
            parameter.fill_(0.5)
    for buffer in buffers_of_draft(name).values():
        buffer.zero_()
    return policy.engine.draft._kept.num_bytes if policy.engine.draft is not None else 0


def buffers_of_draft(name: str) -> dict[str, torch.Tensor]:
    """Those that what drafts has to itself."""
    from chatlearn_vllm.engines import vllm_compat

    engine = _policies[name].engine
    draft = vllm_compat.draft_model(engine._engine)
    shared = {id(buffer) for buffer in engine.model.buffers()}
    buffers = dict(draft.named_buffers()) if draft is not None else {}
    return {own: buffer for own, buffer in buffers.items() if id(buffer) not in shared}


def wake(name: str, model: str, version: int) -> str:
    """Wake up, with a weight sync; the engine's state."""
    policy = _policies[name]
    policy.wake_weights()
    sync(name, model, version)
    policy.wake_kv_cache()
    return policy.engine_state()


def greedy_in_parts(name: str, num_steps: int) -> tuple[list[list[int]], int]:
    """Greedy responses that are cut off after some steps and go on later.

    Returns:
        The responses, and how many tokens there were when they were cut off.
    """
    policy = _policies[name]
    keys = {"temperature": 0.0, "n": 1, "seed": 1, "logprobs": 0, "ignore_eos": True}
    keys["max_tokens"] = MAX_NEW_TOKENS
    begun = [[Begun()] for _ in PROMPTS]
    done: dict[str, Any] = {}
    cut_at = 0
    for max_steps in (num_steps, None):
        for row, ids in enumerate(_prompt_ids()):
            if str(row) not in done:
                request = PartialRequest(str(row), None, ids, keys, begun[row])
                policy.engine.add_partial_request(request)
        finished = policy.engine.run(max_steps=max_steps)
        done |= {output.request_id: output for output in finished}
        policy.engine.cut()
        cut_at = cut_at or sum(len(responses[0].token_ids) for responses in begun)
    return [list(done[str(row)].outputs[0].token_ids) for row in range(len(PROMPTS))], cut_at


def draft_of(name: str, parameter: str) -> torch.Tensor:
    """A parameter of what drafts."""
    from chatlearn_vllm.engines import vllm_compat

    draft = vllm_compat.draft_model(_policies[name].engine._engine)
    return dict(draft.named_parameters())[parameter].detach().clone()


def take_over_draft(name: str, directory: Path | None) -> None:
    """Load another draft, or that of its own directory."""
    _policies[name].engine.load_draft(directory and str(directory))


def why_not_taken_over(name: str, directory: Path) -> str:
    """What a policy, or vLLM, says about a draft that does not fit."""
    try:
        take_over_draft(name, directory)
    except (ValueError, RuntimeError, AssertionError) as error:
        return str(error)
    return "it fits"


def state_of_draft(name: str) -> str:
    """What the weights of the draft are."""
    return _policies[name].engine.draft.state.weights.value


def why_it_cannot_stop(name: str) -> str:
    """What a policy says that is told to draft no more and has to."""
    try:
        _policies[name].set_speculation(False)
    except ValueError as error:
        return str(error)
    return ""


def switch(name: str, is_on: bool) -> None:
    """Draft, or not."""
    _policies[name].set_speculation(is_on)


def measure(name: str) -> SpeculationStats:
    """A rollout in which some steps run without drafts."""
    engine = _policies[name].engine
    take_stats(name)
    for row, ids in enumerate(_prompt_ids()):
        request = {"temperature": 1.0, "max_tokens": 80, "ignore_eos": True}
        engine.add_request(str(row), None, ids[:8], request | {"seed": row})
    engine.speculation.measures = True
    engine.run()
    return take_stats(name)


def drawn_at_one(name: str) -> tuple[list[list[int]], float]:
    """Responses drawn at temperature 1 in a rollout of its own; the share of accepted drafts."""
    policy = _policies[name]
    take_stats(name)
    for row, ids in enumerate(_prompt_ids()):
        request = {"temperature": 1.0, "max_tokens": 80, "ignore_eos": True, "n": 4}
        policy.engine.add_request(str(row), None, ids[:8], request | {"seed": row + 3})
    responses = [list(one.token_ids) for output in policy.engine.run() for one in output.outputs]
    stats = take_stats(name)
    assert stats is not None
    return responses, stats.acceptance_rate


def up_to_the_longest_sequence(name: str) -> SpeculationStats:
    """Greedy responses that end at seq_length, one after the other; what drafting did."""
    policy = _policies[name]
    take_stats(name)
    seq_length = policy.model_args.seq_length
    for row, ids in enumerate(_prompt_ids() * 2):
        ids = ids[:4] * (1 + 2 * row)  # those with longer prompts end earlier
        request = {"temperature": 0.0, "max_tokens": seq_length - len(ids), "ignore_eos": True}
        policy.engine.add_request(str(row), None, ids, request)
    lengths = [len(output.outputs[0].token_ids) for output in policy.engine.run()]
    assert len(set(lengths)) == 2 * len(PROMPTS)
    stats = take_stats(name)
    assert stats is not None
    return stats
