"""How does a Hugging Face model sample a batch of responses as vLLM would?

`transformers.generate` runs the model; `TokenSampler` draws each row's token with the row's own
random numbers and `RowsDone` says which rows are complete, so that a response depends on its seed
and not on the others of its batch. Definitions are those of vLLM: vllm/v1/sample/sampler.py,
vllm/v1/core/sched/utils.py, vllm/v1/engine/detokenizer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatlearn_vllm.engines.request_output import CompletionOutput, Logprob

LEAST_TEMPERATURE = 1e-2
"""vLLM raises positive temperatures to it."""
_INVALID_PREFIX = "Invalid prefix encountered"
"""So begins the bare Exception of `tokenizers` where a token changes the text before it."""


@dataclass(frozen=True)
class HFSampling:
    """How responses are sampled; names, meanings and defaults of `vllm.SamplingParams`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> HFSampling:
        """Take the keys that all responses of a request share.

        Raises:
            ValueError: Transformers has no such key, or a value is none that it takes.
        """
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in given.items() if value is not None}
        if unknown := sorted(given.keys() - known):
            raise ValueError(
                f"{', '.join(unknown)}: no sampling key of inference_engine: transformers; leave "
                "it out, or set inference_engine: vllm"
            )
        values = dict(given)
        for name in ("stop", "stop_token_ids", "allowed_token_ids"):
            if name in values:
                one = isinstance(values[name], str | int)
                values[name] = (values[name],) if one else tuple(values[name])
        if "logit_bias" in values:
            values["logit_bias"] = tuple(
                (int(token), float(bias)) for token, bias in values["logit_bias"].items()
            )
        sampling = cls(**values)
        sampling._check()
        return sampling

    def _check(self) -> None:
        for name, holds, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= -1, "-1 or 0 for all tokens, or a number of tokens"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
            ("logprobs", (self.logprobs or 0) >= 0, "at least 0"),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "at least 0"),
            ("allowed_token_ids", self.allowed_token_ids != (), "left out or not empty"),
            ("stop", "" not in self.stop, "without an empty string"),
            ("detokenize", self.detokenize or not self.stop, "True, stop strings are text"),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    @property
    def named_tokens(self) -> tuple[int, ...]:
        """All token ids that are in the keys."""
        biased = (token for token, _ in self.logit_bias)
        return (*self.stop_token_ids, *(self.allowed_token_ids or ()), *biased)

    @property
    def has_penalties(self) -> bool:
        """Whether tokens count that are there already."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@dataclass(frozen=True)
class StopTokens:
    """Tokens that end a response."""

    eos_token_id: int | None
    """The tokenizer's: no stop reason."""
    others: frozenset[int]
    """Of generation_config.json and of the request: their own stop reason."""
    masked: tuple[int, ...]
    """Those that have no probability before `min_tokens`."""

    @classmethod
    def of(
        cls, sampling: HFSampling, eos_token_id: int | None, model_eos_ids: Iterable[int]
    ) -> StopTokens:
        """Join those of the request, the tokenizer and the model.

        Args:
            sampling: of the request.
            eos_token_id: the tokenizer's.
            model_eos_ids: of generation_config.json.
        """
        asked = set(sampling.stop_token_ids)
        eos = {*model_eos_ids} | ({eos_token_id} - {None})
        ending = set() if sampling.ignore_eos else eos
        return cls(
            eos_token_id=None if sampling.ignore_eos else eos_token_id,
            others=frozenset((asked | ending) - ({eos_token_id} if ending else set())),
            masked=tuple(sorted(asked | eos)),
        )


class Row:
    """One response while it is generated."""

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        sampling: HFSampling,
        stops: StopTokens,
        *,
        index: int,
        max_tokens: int,
        generator: torch.Generator,
        tokenizer: Any,
    ) -> None:
        """Begin it.

        Args:
            prompt_token_ids: of its prompt.
            sampling: how its tokens are drawn.
            stops: which of them end it.
            index: among the responses to the prompt.
            max_tokens: its greatest length.
            generator: its own random numbers, on the model's device.
            tokenizer: makes its text.
        """
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self.index = index
        self.max_tokens = max_tokens
        self.generator = generator
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._stops = stops
        self._logprobs: list[dict[int, Logprob]] = []
        self._stop_reason: int | str | None = None
        self._text = _Text(tokenizer, prompt_token_ids, sampling.skip_special_tokens)

    def add(self, token: int, logprobs: dict[int, Logprob]) -> None:
        """Add a sampled token, and see whether the response is complete."""
        self.token_ids.append(token)
        self._logprobs.append(logprobs)
        if token == self._stops.eos_token_id:
            self.finish_reason = "stop"
        elif token in self._stops.others:
            self.finish_reason, self._stop_reason = "stop", token
        is_shown = self.finish_reason is None or self.sampling.include_stop_str_in_output
        if self.finish_reason is None and len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.sampling.detokenize and is_shown:
            self._add_text(token)

    def _add_text(self, token: int) -> None:
        before = len(self._text.text)
        self._text.add(token)
        if len(self.token_ids) <= self.sampling.min_tokens or len(self._text.text) == before:
            return
        ends = [
            (start + len(stop), stop)
            for stop in self.sampling.stop
            if (start := self._text.text.find(stop, max(0, before + 1 - len(stop)))) >= 0
        ]
        if ends:
            end, stop = min(ends, key=lambda found: found[0])
            self.finish_reason, self._stop_reason = "stop", stop
            shown = end if self.sampling.include_stop_str_in_output else end - len(stop)
            self._text.text = self._text.text[:shown]

    def completion(self) -> CompletionOutput:
        """The complete response."""
        chosen = [
            entry[token].logprob
            for token, entry in zip(self.token_ids, self._logprobs, strict=True)
        ]
        asked = self.sampling.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self._text.text,
            token_ids=self.token_ids,
            cumulative_logprob=sum(chosen) if asked else None,
            logprobs=self._logprobs if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )


class _Text:
    """The text of a response that grows token by token."""

    def __init__(
        self, tokenizer: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._token_ids: list[int] = []
        self._stream = None
        if getattr(tokenizer, "is_fast", False):
            # Knows the prompt, so a space between prompt and response stays.
            self._stream = DecodeStream(list(prompt_token_ids), skip_special_tokens)

    def add(self, token: int) -> None:
        """Add a token; the text grows when the last character is complete."""
        if self._stream is not None:
            self.text += self._next_text(token) or ""
            return
        self._token_ids.append(token)
        self.text = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip)

    def _next_text(self, token: int) -> str | None:
        tokenizer = self._tokenizer.backend_tokenizer
        try:
            return self._stream.step(tokenizer, token)
        except Exception as error:  # tokenizers has no narrower class
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            # One bad byte spoils the good ones beside it. As in vLLM the text goes on without it.
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return self._stream.step(tokenizer, token)


class TokenSampler(LogitsProcessor):
    """Draws the next token of every row, and leaves `generate` no other choice."""

    def __init__(self, rows: Sequence[Row], stops: StopTokens, vocab_size: int) -> None:
        """Prepare a batch.

        Args:
            rows: B responses with equal sampling keys.
            stops: their stop tokens.
            vocab_size: V.
        """
        self._rows = rows
        self._stops = stops
        self._sampling = sampling = rows[0].sampling
        self._warpers = LogitsProcessorList()
        if not sampling.is_greedy:
            temperature = max(sampling.temperature, LEAST_TEMPERATURE)
            self._warpers.append(TemperatureLogitsWarper(temperature))
            if sampling.min_p > 0:
                self._warpers.append(MinPLogitsWarper(sampling.min_p))
            if 0 < sampling.top_k < vocab_size:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._penalties: _Penalties | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Sample from float32 [B, V] logits.

        Returns:
            [B, V] with the sampled tokens as the largest entries.
        """
        scores = self._processed(input_ids, scores)
        logprobs = scores.log_softmax(-1)
        tokens = scores.argmax(-1) if self._sampling.is_greedy else self._drawn(scores)
        if self._penalties is not None:
            self._penalties.count(tokens)
        self._note(tokens, logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def _processed(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sampling, num_tokens = self._sampling, max(len(row.token_ids) for row in self._rows)
        if sampling.allowed_token_ids is not None:
            masked = torch.full_like(scores, -torch.inf)
            allowed = list(sampling.allowed_token_ids)
            masked[:, allowed] = scores[:, allowed]
            scores = masked
        if sampling.logit_bias:
            tokens, biases = zip(*sampling.logit_bias, strict=True)
            scores[:, list(tokens)] += scores.new_tensor(biases)
        if num_tokens < sampling.min_tokens and self._stops.masked:
            scores[:, list(self._stops.masked)] = -torch.inf
        if sampling.has_penalties:
            if self._penalties is None:
                self._penalties = _Penalties(self._rows, scores)
            scores = self._penalties.apply(scores)
        return self._warpers(input_ids, scores)

    def _drawn(self, scores: torch.Tensor) -> torch.Tensor:
        """[B] tokens: the first of exponential clocks, each as fast as its token is probable."""
        noise = torch.ones_like(scores)
        for row, own in zip(self._rows, noise, strict=True):
            if row.finish_reason is None:
                own.exponential_(generator=row.generator)
        return (scores.softmax(-1) / noise).argmax(-1)

    def _note(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        chosen = logprobs.gather(1, tokens[:, None])
        ranks = (logprobs >= chosen).sum(-1)
        # One copy to the host; token ids are exact in float64.
        noted = torch.stack([tokens.double(), chosen[:, 0].double(), ranks.double()], 1).tolist()
        tops = top_logprobs(logprobs, self._sampling.logprobs or 0)
        for row, (token, logprob, rank), top in zip(self._rows, noted, tops, strict=True):
            if row.finish_reason is None:
                row.add(int(token), {int(token): Logprob(logprob, int(rank))} | top)


class _Penalties:
    """Counts the tokens that are there, and lowers their logits."""

    def __init__(self, rows: Sequence[Row], scores: torch.Tensor) -> None:
        self._sampling = rows[0].sampling
        self._counts = torch.zeros_like(scores)
        self._in_prompt = torch.zeros_like(scores, dtype=torch.bool)
        for row, in_prompt in zip(rows, self._in_prompt, strict=True):
            in_prompt[list(row.prompt_token_ids)] = True

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """[B, V] logits after all three penalties."""
        sampling, is_there = self._sampling, self._counts > 0
        factor = torch.where(
            is_there | self._in_prompt, sampling.repetition_penalty, torch.ones_like(scores)
        )
        scores = torch.where(scores > 0, scores / factor, scores * factor)
        scores = scores - sampling.frequency_penalty * self._counts
        return scores - sampling.presence_penalty * is_there

    def count(self, tokens: torch.Tensor) -> None:
        """Add a token per row."""
        self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(self._counts[:, :1]))


class RowsDone(StoppingCriteria):
    """Says which rows need no more tokens."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[B] whether each row is complete."""
        done = [row.finish_reason is not None for row in self._rows]
        return torch.tensor(done, device=input_ids.device)


def top_logprobs(logprobs: torch.Tensor, number: int) -> list[dict[int, Logprob]]:
    """The most probable tokens of each row of [B, V], best first."""
    if number == 0:
        return [{} for _ in logprobs]
    values, tokens = logprobs.topk(min(number, logprobs.shape[-1]))
    return [
        {
            token: Logprob(value, rank)
            for rank, (token, value) in enumerate(zip(row, own, strict=True), start=1)
        }
        for row, own in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
