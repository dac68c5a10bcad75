"""One Hugging Face Transformers model that answers requests as the vLLM engine does.

Responses are generated in batches: as many as `max_num_seqs` begin together, and the batch ends
with its longest. What the requests ask for, and what they get, has vLLM's names and meanings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from chatlearn_vllm.engines.beam_search import BeamSearchKeys
from chatlearn_vllm.engines.generation_engine import GenerationEngine
from chatlearn_vllm.engines.hf_sampling import (
    HFSampling,
    Row,
    RowsDone,
    StopTokens,
    TokenSampler,
    top_logprobs,
)
from chatlearn_vllm.engines.hf_weights import WeightMemory, tensors_in
from chatlearn_vllm.engines.request_output import (
    BeamOutput,
    CompletionOutput,
    Logprob,
    RequestOutput,
)
from chatlearn_vllm.engines.scheduled_batch import NewRequest, ScheduledBatch
from chatlearn_vllm.engines.vllm_executor import Step, StepOwner
from chatlearn_vllm.engines.vllm_partial import PartialRequest
from chatlearn_vllm.engines.whole_tensors import checked_tensors
from chatlearn_vllm.layouts import (
    CheckpointShards,
    ModelShape,
    ParamLayout,
    check_live_parameters,
)


class HFEngine(GenerationEngine):
    """A model of `transformers.AutoModelForCausalLM` behind the interface of the vLLM engine."""

    def __init__(
        self,
        model_dir: Path,
        shape: ModelShape,
        tokenizer: Any,
        owner: StepOwner,
        *,
        dtype: torch.dtype,
        max_num_seqs: int,
        max_model_len: int,
        load_format: str = "dummy",
        attn_implementation: str = "sdpa",
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        """Build the model on this process's device.

        Args:
            model_dir: Hugging Face directory with config.json, and weights unless `load_format` is
                dummy.
            shape: sizes of the model.
            tokenizer: makes text of tokens; its end-of-sequence token ends responses.
            owner: its `on_step` is called once per batch.
            dtype: of the weights.
            max_num_seqs: responses, or beams, in a batch.
            max_model_len: tokens of a prompt with its response.
            load_format: "dummy" for random weights.
            attn_implementation: Transformers' attention.
            trust_remote_code: whether the directory may bring code.
            seed: for requests without one.

        Raises:
            ValueError: Transformers' model holds other tensors than the weight sync knows.
        """
        self._owner = owner
        self._tokenizer = tokenizer
        self._shape = shape
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._device = _device()
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        if load_format == "dummy":
            config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
            devices = [self._device] if self._device.type == "cuda" else []
            with torch.random.fork_rng(devices), self._device:
                model = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=trust_remote_code, **options
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(
                model_dir, trust_remote_code=trust_remote_code, **options
            ).to(self._device)
        self._model = model.eval().requires_grad_(False)
        self._model_eos_ids = _eos_ids(model_dir, model.config)
        # What is asked for comes with each request; nothing is added from the checkpoint.
        self._model.generation_config = GenerationConfig()
        self._tensors = tensors_in(model, shape)
        self._num_elements = sum(tensor.numel() for tensor in self._tensors.values())
        self._dtype = dtype
        self._memory = WeightMemory(model)
        self._seeds = torch.Generator().manual_seed(seed)
        self._requests: dict[str, _Sampled | _Searched] = {}
        self._counters: Counter[str] = Counter()
        super().__init__(has_weights=load_format != "dummy")

    # ---- requests ---------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt: str | None, token_ids: list[int], sampling: dict[str, Any]
    ) -> None:
        """See GenerationEngine."""
        try:
            self._requests[request_id] = self._request(prompt, list(token_ids), sampling)
        except ValueError as error:
            raise ValueError(f"request {request_id}: {error}") from error

    def _request(
        self, prompt: str | None, token_ids: list[int], given: dict[str, Any]
    ) -> _Sampled | _Searched:
        size = self._shape.vocab_size
        room = self._max_model_len - len(token_ids)
        if not token_ids or room < 1:
            raise ValueError(
                f"a prompt of {len(token_ids)} tokens; it must have at least one and leave room "
                f"for a response in seq_length={self._max_model_len}"
            )
        limit = given.get("max_tokens", 16)
        max_tokens = room if limit is None else min(limit, room)
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        if "beam_width" in given:
            keys = BeamSearchKeys.of(given | {"max_tokens": max_tokens})
            request = _Searched(prompt, token_ids, keys)
            named = keys.stop_token_ids
        else:
            request = self._sampled(prompt, token_ids, given, max_tokens)
            named = request.sampling.named_tokens
        for token in (*token_ids, *named):
            if not 0 <= token < size:
                raise ValueError(f"token {token} is outside the vocabulary of {size} tokens")
        return request

    def _sampled(
        self, prompt: str | None, token_ids: list[int], given: dict[str, Any], max_tokens: int
    ) -> _Sampled:
        number, seed = given.get("n", 1), given.get("seed")
        own = ("n", "seed", "max_tokens")
        sampling = HFSampling.of({name: given[name] for name in given if name not in own})
        if sampling.is_greedy and number > 1:
            raise ValueError(f"n={number} with temperature=0: greedy responses would all be equal")
        if seed is None:
            seed = int(torch.randint(2**62, (1,), generator=self._seeds))
        stops = StopTokens.of(sampling, self._tokenizer.eos_token_id, self._model_eos_ids)
        rows = [
            Row(
                token_ids,
                sampling,
                stops,
                index=index,
                max_tokens=max_tokens,
                generator=torch.Generator(self._device).manual_seed((seed + index) % 2**63),
                tokenizer=self._tokenizer,
            )
            for index in range(number)
        ]
        return _Sampled(prompt, token_ids, sampling, stops, rows)

    def add_partial_request(self, request: PartialRequest) -> None:
        """Refused: a batch ends with its longest response, there is nothing to cut off.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "inference_engine: transformers has no partial rollouts; set "
            "runtime.max_rollout_round: 1, or inference_engine: vllm"
        )

    @property
    def requests(self) -> tuple[str, ...]:
        """Ids of the requests without an answer, in the order in which they were added."""
        return tuple(self._requests)

    def run(
        self,
        min_finished: int | None = None,
        max_steps: int | None = None,
    ) -> list[RequestOutput]:
        """See GenerationEngine; a step is a batch of whole responses."""
        self.require_ready()
        wanted = len(self._requests)
        wanted = wanted if min_finished is None else min(min_finished, wanted)
        steps = 0
        try:
            while sum(one.is_finished for one in self._requests.values()) < wanted:
                if steps == max_steps:
                    break
                self._owner.on_step(self._next_step())
                steps += 1
        except BaseException:
            self.abort()
            raise
        finished = [name for name, one in self._requests.items() if one.is_finished]
        return [_output(name, self._requests.pop(name)) for name in finished]

    def cut(self) -> list[PartialRequest]:
        """See GenerationEngine; there are no partial requests."""
        self.abort()
        return []

    def abort(self) -> None:
        """Drop all requests."""
        self._requests = {}

    def _next_step(self) -> Step:
        """What is generated next: the first open request, and others that ask for the same."""
        open_ones = {name: one for name, one in self._requests.items() if not one.is_finished}
        first = next(iter(open_ones.values()))
        if isinstance(first, _Searched):
            alike = {
                name: one
                for name, one in open_ones.items()
                if isinstance(one, _Searched) and one.keys == first.keys
            }
            names = list(alike)[: max(1, self._max_num_seqs // first.keys.beam_width)]
            new = [NewRequest(name, alike[name].token_ids) for name in names]
            searches = [alike[name] for name in names]
            return Step(ScheduledBatch(new), lambda: self._search(searches))
        rows = [
            (name, row)
            for name, one in open_ones.items()
            if isinstance(one, _Sampled) and one.sampling == first.sampling
            for row in one.rows
            if row.finish_reason is None
        ][: self._max_num_seqs]
        new = [NewRequest(f"{row.index}_{name}", row.prompt_token_ids) for name, row in rows]
        asking = [open_ones[name] for name in dict.fromkeys(name for name, _ in rows)]
        return Step(ScheduledBatch(new), lambda: self._generate([row for _, row in rows], asking))

    # ---- generating -------------------------------------------------------------------------

    def _generate(self, rows: list[Row], asking: list[_Sampled]) -> None:
        """Make whole responses, and what is asked of their prompts."""
        sampler = TokenSampler(rows, asking[0].stops, self._shape.vocab_size)
        self._run_model(
            [row.prompt_token_ids for row in rows],
            GenerationConfig(max_new_tokens=max(row.max_tokens for row in rows)),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([RowsDone(rows)]),
        )
        self._count(len(row.token_ids) for row in rows)
        for one in asking:
            if one.prompt_logprobs is None and one.sampling.prompt_logprobs is not None:
                one.prompt_logprobs = self._prompt_logprobs(one)

    def _search(self, searches: list[_Searched]) -> None:
        """Find the best beams with Transformers' own search."""
        keys, eos = searches[0].keys, self._tokenizer.eos_token_id
        ends = {*keys.stop_token_ids}
        if not keys.ignore_eos:
            ends |= self._model_eos_ids | ({eos} - {None})
        prompts = [one.token_ids for one in searches]
        found = self._run_model(
            prompts,
            GenerationConfig(
                num_beams=keys.beam_width,
                num_return_sequences=keys.n,
                length_penalty=keys.length_penalty,
                max_new_tokens=keys.max_tokens,
                eos_token_id=sorted(ends) or None,
                early_stopping=False,
                return_dict_in_generate=True,
                output_scores=True,
            ),
        )
        steps = self._model.compute_transition_scores(
            found.sequences, found.scores, found.beam_indices
        ).tolist()
        lengths = (found.beam_indices >= 0).sum(-1).tolist()
        sequences = found.sequences[:, max(map(len, prompts)) :].tolist()
        scores = found.sequences_scores.tolist()
        for row, length in enumerate(lengths):
            tokens = sequences[row][:length]
            stop = tokens[-1] if tokens[-1] in ends else None
            shown = tokens if stop is None else tokens[:-1]
            searches[row // keys.n].outputs.append(
                BeamOutput(
                    index=row % keys.n,
                    text=self._tokenizer.decode(
                        shown, skip_special_tokens=keys.skip_special_tokens
                    ),
                    token_ids=tokens,
                    cumulative_logprob=sum(steps[row][:length]),
                    logprobs=[
                        {token: Logprob(logprob)}
                        for token, logprob in zip(tokens, steps[row], strict=False)
                    ],
                    finish_reason="length" if stop is None else "stop",
                    stop_reason=None if stop == eos and not keys.ignore_eos else stop,
                    score=scores[row],
                )
            )
        self._count(lengths)

    def _run_model(self, prompts: list[list[int]], config: GenerationConfig, **options: Any) -> Any:
        """Call `generate` on prompts of any lengths, which end together."""
        width = max(map(len, prompts))
        input_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for ids, mask, prompt in zip(input_ids, attention_mask, prompts, strict=True):
            ids[width - len(prompt) :] = torch.tensor(prompt)
            mask[width - len(prompt) :] = 1
        config.do_sample = False
        config.pad_token_id = self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0
        return self._model.generate(
            input_ids.to(self._device),
            attention_mask=attention_mask.to(self._device),
            generation_config=config,
            **options,
        )

    @torch.no_grad()
    def _prompt_logprobs(self, one: _Sampled) -> list[dict[int, Logprob] | None]:
        """Of every token of a prompt but the first, under the model's plain softmax."""
        tokens = torch.tensor(one.token_ids, device=self._device)
        logits = self._model(tokens[None]).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, tokens[1:, None])
        ranks = (logprobs >= chosen).sum(-1)
        return [
            None,
            *(
                {token: Logprob(logprob, rank)} | top
                for token, logprob, rank, top in zip(
                    one.token_ids[1:],
                    chosen[:, 0].tolist(),
                    ranks.tolist(),
                    top_logprobs(logprobs, one.sampling.prompt_logprobs),
                    strict=True,
                )
            ),
        ]

    def _count(self, lengths: Iterable[int]) -> None:
        self._counters["batches"] += 1
        self._counters["generation_tokens"] += sum(lengths)

    # ---- memory and weights -----------------------------------------------------------------

    def _sleep(self, level: int) -> None:
        # Views would hold the memory; a weight sync is planned with names, shapes and types.
        self._tensors = {name: tensor.to("meta") for name, tensor in self._tensors.items()}
        self._memory.give_back(keep_on_host=level == 1)

    def _wake_weights(self) -> None:
        self._memory.take()
        self._tensors = tensors_in(self._model, self._shape)

    def _wake_kv_cache(self) -> None:
        """The cache lives as long as a batch."""

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See GenerationEngine."""
        targets = self.begin_weight_update()
        for name, tensor in checked_tensors(tensors, self._shape):
            targets[name].copy_(tensor)

    def direct_copy_problem(self) -> str | None:
        """None: the parameters hold the tensors of the checkpoint."""
        return None

    def parameters(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors: views of the live parameters, without memory while asleep."""
        return self._tensors

    def shards(self, num_replicas: int) -> CheckpointShards:
        """Each replica holds every tensor whole."""
        return CheckpointShards(self._shape, num_replicas, self._num_elements)

    def check_layouts(self, layouts: list[ParamLayout]) -> None:
        """See GenerationEngine."""
        live = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        check_live_parameters(layouts, live, "Transformers")

    @property
    def model(self) -> torch.nn.Module:
        """The live model."""
        return self._model

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._device

    def metrics(self) -> dict[str, float]:
        """Batches and tokens generated so far, and the bytes of the weights on the device."""
        return {**self._counters, "weight_bytes": self._memory.num_bytes}


class _Sampled:
    """A prompt and its responses, as far as they are."""

    def __init__(
        self,
        prompt: str | None,
        token_ids: list[int],
        sampling: HFSampling,
        stops: StopTokens,
        rows: list[Row],
    ) -> None:
        self.prompt, self.token_ids = prompt, token_ids
        self.sampling, self.stops, self.rows = sampling, stops, rows
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all its responses are complete."""
        return all(row.finish_reason is not None for row in self.rows)

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The complete responses."""
        return [row.completion() for row in self.rows]


class _Searched:
    """A prompt whose most probable responses are searched."""

    prompt_logprobs = None

    def __init__(self, prompt: str | None, token_ids: list[int], keys: BeamSearchKeys) -> None:
        self.prompt, self.token_ids, self.keys = prompt, token_ids, keys
        self.outputs: list[CompletionOutput] = []

    @property
    def is_finished(self) -> bool:
        """Whether they are found."""
        return bool(self.outputs)


def _output(request_id: str, one: _Sampled | _Searched) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        prompt=one.prompt,
        prompt_token_ids=one.token_ids,
        prompt_logprobs=one.prompt_logprobs,
        outputs=one.outputs,
        finished=True,
    )


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _eos_ids(model_dir: Path, config: Any) -> set[int]:
    """End-of-sequence tokens of generation_config.json, or of config.json without one."""
    try:
        found = GenerationConfig.from_pretrained(model_dir).eos_token_id
    except OSError:
        found = GenerationConfig.from_model_config(config).eos_token_id
    if found is None:
        return set()
    return {found} if isinstance(found, int) else set(found)
