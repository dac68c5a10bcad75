"""How fast is `generate` of transformers, at the batch size that suits it best?"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from typing import TYPE_CHECKING, Any

import torch
import transformers

from chatlearn_vllm.bench.cases import TRANSFORMERS
from chatlearn_vllm.bench.measure import Pass, Stopwatch, acceptance, latency, throughput
from chatlearn_vllm.bench.options import DTYPES
from chatlearn_vllm.bench.workload import has_tokenizer, has_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chatlearn_vllm.bench.child import Task

_FIRST_BATCH_SIZE = {"cuda": 64, "cpu": 4}
_WORTHWHILE = 1.03
"""A larger batch must bring so much more throughput, or it is the last one tried."""


def measure(task: Task) -> dict[str, Any]:
    """Measure one case of transformers; its part of the results."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = TRANSFORMERS[task.case.engine]
    task.phase("load")
    start = time.perf_counter()
    generator = _Generator(task, device, attention)
    load_s = time.perf_counter() - start

    search = _BatchSizes(task, generator)
    passes = search.run()
    # A pass of one batch, as large as suits the engine, stands for as many as are needed.
    result = {
        "load_s": load_s,
        "throughput": throughput(passes, task.options.num_completions),
        "batch_sizes": search.tried,
        "batch_size": search.best,
        "search_ended": search.ended,
        "latency": None,
        "speculation": generator.speculation() if task.case.speculative else None,
        "engine_arguments": generator.arguments,
        "sampling": generator.config.to_diff_dict(),
        "notices": generator.notices,
        "memory_phases": [f"batch_size={search.best}"],
    }
    if task.options.latency_requests:
        task.phase("latency")
        alone = [generator.stream(1, n) for n in range(task.options.latency_requests)]
        loaded = generator.stream(search.best, 0)
        result["latency"] = {"alone": latency(alone), "loaded": latency([loaded])}
    return result


def end_token_ids(directory: Path) -> list[int]:
    """The tokens that end a response, as vLLM finds them, so that both do the same work.

    Those of generation_config.json, else of config.json, and the tokenizer's.

    Args:
        directory: of the model.
    """
    try:
        config = transformers.GenerationConfig.from_pretrained(directory)
    except OSError:  # no generation_config.json
        model_config = transformers.AutoConfig.from_pretrained(directory)
        config = transformers.GenerationConfig.from_model_config(model_config)
    given = config.eos_token_id
    found = {given} if isinstance(given, int) else set(given or ())
    if has_tokenizer(directory):
        found.add(transformers.AutoTokenizer.from_pretrained(directory).eos_token_id)
    return sorted(found - {None})


class _Generator:
    """A model, and what is asked of it."""

    def __init__(self, task: Task, device: str, attention: str) -> None:
        options = task.options
        self._task = task
        self._device = device
        self._dtype_name = options.torch_dtype_name(on_gpu=device == "cuda")
        self._dtype = getattr(torch, self._dtype_name)
        self.notices: list[str] = []
        """What of the options has another effect here."""
        if (wanted := DTYPES.get(options.dtype, self._dtype_name)) != self._dtype_name:
            self.notices.append(f"dtype: {wanted} becomes {self._dtype_name} (CPU)")
        self.arguments = {
            "attn_implementation": attention, "dtype": str(self._dtype), "device": device,
        }  # fmt: skip
        torch.manual_seed(options.seed)
        self._model = self._load(task.model_dir, attention)
        self._eos_ids = [] if options.ignore_eos else end_token_ids(task.model_dir)
        self.config = transformers.GenerationConfig(
            do_sample=options.temperature > 0,
            temperature=options.temperature or None,
            top_k=0 if options.temperature else None,
            max_new_tokens=options.max_tokens,
            eos_token_id=self._eos_ids or None,
            pad_token_id=self._model.config.pad_token_id or 0,
        )
        self._model.generation_config = self.config
        self._drafting: dict[str, Any] = {}
        self.forget_drafts()
        self._prompt_length = self._num_calls = 0
        if task.case.speculative:
            self._draft(attention)

    def _load(self, directory: Any, attention: str) -> Any:
        arguments = {"dtype": self._dtype, "attn_implementation": attention}
        if has_weights(directory):
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, **arguments)
            return model.to(self._device).eval()
        config = transformers.AutoConfig.from_pretrained(directory)
        with torch.device(self._device):
            return transformers.AutoModelForCausalLM.from_config(config, **arguments).eval()

    def _draft(self, attention: str) -> None:
        """Propose tokens with the draft model, or with n-grams of the text so far."""
        options = self._task.options
        if options.draft is None:
            self._drafting = {"prompt_lookup_num_tokens": options.num_speculative_tokens}
        else:
            from pathlib import Path

            draft = self._load(Path(options.draft), attention)
            draft.generation_config.num_assistant_tokens = options.num_speculative_tokens
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = 0.0
            self._drafting = {"assistant_model": draft}
        self._model.register_forward_pre_hook(self._count_drafts, with_kwargs=True)

    def _count_drafts(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Each call verifies what was proposed behind the tokens that were there before."""
        past = kwargs.get("past_key_values")
        is_first = past is None or past.get_seq_length() == 0
        num_proposed = kwargs["input_ids"].shape[1] - (self._prompt_length if is_first else 1)
        self._num_calls += 1
        self._counts["drafts"] += num_proposed > 0
        self._counts["draft_tokens"] += num_proposed

    def _prompts(self, batch_size: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts of a pass, each for all its completions, padded at the left, and their mask.

        Both [batch_size, longest prompt], int64.
        """
        options = self._task.options
        rows = []
        for at in itertools.count(number * 1000):
            prompts = self._task.pass_prompts(at)
            rows += [one.token_ids for one in prompts for _ in range(options.completions)]
            if len(rows) >= batch_size:
                break
        rows = rows[:batch_size]
        width = max(len(row) for row in rows)
        pad = self.config.pad_token_id
        prompts = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return prompts, mask

    @torch.inference_mode()
    def generate(self, batch_size: int, number: int, *, streamer: Any = None) -> Pass:
        """Answer one batch."""
        prompts, mask = self._prompts(batch_size, number)
        self._prompt_length, self._num_calls = prompts.shape[1], 0
        self._synchronize()
        start = time.perf_counter()
        sequences = self._model.generate(
            prompts.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=self._task.options.max_tokens,
            streamer=streamer,
            **self._drafting,
        )
        responses = sequences[:, prompts.shape[1] :].cpu()
        seconds = time.perf_counter() - start
        tokens = self._num_tokens(responses)
        # A call makes one token of its own; any other one was proposed.
        self._counts["accepted_tokens"] += max(0, tokens - self._num_calls)
        return Pass(seconds, batch_size, tokens)

    def _num_tokens(self, responses: torch.Tensor) -> int:
        """Up to the first end-of-sequence token, which counts."""
        if not self._eos_ids:
            return responses.numel()
        ends = torch.isin(responses, torch.tensor(self._eos_ids)).int()
        after = ends.cumsum(1) - ends  # 0 up to and with the first end
        return int((after == 0).sum())

    def stream(self, batch_size: int, number: int) -> Stopwatch:
        """Answer one batch, and note when its tokens come."""
        streamer = _Streamer(batch_size, self._eos_ids)
        self.generate(batch_size, number + 1, streamer=streamer)
        return streamer.watch

    def forget_drafts(self) -> None:
        """Count them from now on; those of a warm-up do not count."""
        self._counts = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}

    def speculation(self) -> dict[str, Any]:
        """What was accepted since they were forgotten."""
        options = self._task.options
        return {
            "method": "draft_model" if options.draft else "ngram",
            "num_speculative_tokens": options.num_speculative_tokens,
            **acceptance(**self._counts),
        }

    def free(self) -> None:
        """Give back what an attempt that failed holds."""
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


class _Streamer(transformers.generation.streamers.BaseStreamer):
    """Gets the tokens of a batch as they come, from `generate`; a row's until it ends.

    What comes afterwards is padding, as long as other rows go on.
    """

    def __init__(self, batch_size: int, eos_ids: Sequence[int]) -> None:
        self.watch = Stopwatch()
        self._batch_size = batch_size
        self._eos_ids = set(eos_ids)
        self._ended: set[int] = set()
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts first, then each step's tokens."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for row, tokens in enumerate(value.reshape(self._batch_size, -1).tolist()):
            if row in self._ended:
                continue
            ends = [place for place, token in enumerate(tokens, 1) if token in self._eos_ids]
            self.watch.tokens(row, ends[0] if ends else len(tokens))
            if ends:
                self._ended.add(row)

    def end(self) -> None:
        """Nothing is kept back."""


class _BatchSizes:
    """Searches the batch size with the highest throughput; each try is a whole measurement.

    Before it, `warmup` passes of that size are left out: PyTorch's allocator takes memory anew for
    each length of a KV cache that grows, which makes a first pass several times as slow.
    """

    def __init__(self, task: Task, generator: _Generator) -> None:
        self._task = task
        self._generator = generator
        self.tried: list[dict[str, Any]] = []
        self.best = 0
        self.ended = ""
        """Why no larger one was tried."""

    def run(self) -> list[Pass]:
        """The passes with the best batch size.

        Raises:
            torch.OutOfMemoryError: not even the smallest one fits.
        """
        options = self._task.options
        fixed = 1 if self._task.case.speculative else None  # generate() drafts for one sequence
        if options.hf_batch_size != "auto":
            fixed = fixed or min(int(options.hf_batch_size), options.num_completions)
        if fixed:
            self.best, self.ended = fixed, "the batch size was given"
            if self._task.case.speculative:
                self.ended = "transformers drafts for one sequence at a time"
            # There is no search whose time could be over.
            return self._repeat(fixed, [self._warm(fixed)], end=math.inf)
        return self._search()

    def _search(self) -> list[Pass]:
        options = self._task.options
        end = time.perf_counter() + options.hf_search_seconds
        found: dict[int, Pass] = {}
        size = min(_FIRST_BATCH_SIZE[self._generator.arguments["device"]], options.num_completions)
        while True:
            begin = time.perf_counter()
            with contextlib.suppress(torch.OutOfMemoryError):
                found[size] = self._warm(size)
            if size not in found:
                self._generator.free()
                self.tried.append({"batch_size": size, "output_tokens_per_s": None})
                self.ended = f"no memory for a batch of {size}"
                if found or size == 1:
                    break
                size //= 2
                continue
            speed = found[size].tokens_per_s
            self.tried.append({"batch_size": size, "output_tokens_per_s": speed})
            before = max((one.tokens_per_s for n, one in found.items() if n != size), default=0.0)
            now = time.perf_counter()
            if self.ended.startswith("no memory"):
                break
            if speed < _WORTHWHILE * before:
                self.ended = f"a batch of {size} brought less than 3% more"
                break
            if size >= options.num_completions:
                self.ended = "all completions are in one batch"
                break
            # Twice as many take no less than these took.
            if now + now - begin > end:
                self.ended = f"--hf-search-seconds={options.hf_search_seconds:g} were over"
                break
            size = min(2 * size, options.num_completions)
        if not found:
            raise torch.OutOfMemoryError("CUDA out of memory with a batch of one sequence")
        self.best = max(found, key=lambda n: found[n].tokens_per_s)
        self._task.phase(f"batch_size={self.best}")
        self._generator.free()
        return self._repeat(self.best, [found[self.best]], end=end)

    def _warm(self, size: int) -> Pass:
        """A pass after those that do not count."""
        self._task.phase(f"batch_size={size}")
        for _ in range(self._task.options.warmup):
            self._generator.generate(size, 0)
        self._generator.forget_drafts()
        return self._generator.generate(size, 0)

    def _repeat(self, size: int, passes: list[Pass], *, end: float) -> list[Pass]:
        """Measure as often as asked for, as long as the time for the search lasts."""
        while len(passes) < self._task.options.repeat:
            if time.perf_counter() + passes[-1].seconds > end:
                break
            passes.append(self._generator.generate(size, len(passes)))
        return passes
