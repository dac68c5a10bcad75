"""How fast is vLLM by itself: `LLM.generate` on a list of prompts?"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from chatlearn_vllm.bench.measure import Pass, Stopwatch, latencies, throughput
from chatlearn_vllm.bench.vllm_arguments import (
    bare_engine_arguments,
    make_job,
    speculation,
)
from chatlearn_vllm.data.seeds import sample_seed

if TYPE_CHECKING:
    from chatlearn_vllm.bench.child import Task
    from chatlearn_vllm.bench.workload import Prompt


def measure(task: Task) -> dict[str, Any]:
    """Measure one case of bare vLLM; its part of the results."""
    from chatlearn_vllm.engines.vllm_compat import installed_version, needs_dummy_batch

    installed_version()
    import torch

    from chatlearn_vllm.engines.vllm_arguments import sampling_arguments

    options = task.options
    task.phase("load")
    start = time.perf_counter()
    job = make_job(task)
    arguments, notices = bare_engine_arguments(task, job, on_gpu=torch.cuda.is_available())
    from vllm import LLM

    llm = LLM(**copy.deepcopy(arguments))  # vLLM 0.25 writes objects into its maps
    if needs_dummy_batch(pipeline_parallel_size=task.case.pipeline_parallel_size):
        llm.collective_rpc("execute_dummy_batch")
    load_s = time.perf_counter() - start

    sampling = sampling_arguments(job.models["policy"].model_args, is_eval=False)
    if not task.case.logprobs:
        sampling["logprobs"] = None
    sampling["max_tokens"] = options.max_tokens
    bare = _BareVLLM(task, llm, sampling)

    task.phase("warmup")
    for number in range(options.warmup):
        bare.generate(options.repeat + number)
    task.phase("throughput")
    before = _counters(llm) if task.case.speculative else {}
    passes = [bare.generate(number) for number in range(options.repeat)]
    after = _counters(llm) if task.case.speculative else {}
    result = {
        "load_s": load_s,
        "throughput": throughput(passes, options.num_completions),
        "latency": None,
        "speculation": speculation(job, {name: after[name] - before[name] for name in after}),
        "engine_arguments": arguments,
        "sampling": sampling | {"seed": "one per request" if task.case.seeds else None},
        "notices": notices,
        "memory_phases": ["throughput"],
    }
    if options.latency_requests:
        task.phase("latency")
        result["latency"] = latencies(bare.stream, *task.latency_prompts(), options.completions)
    return result


def _counters(llm: Any) -> dict[str, float]:
    """vLLM's counters by name."""
    return {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}


class _BareVLLM:
    """An engine, and what is asked of it."""

    def __init__(self, task: Task, llm: Any, sampling: dict[str, Any]) -> None:
        self._task = task
        self._llm = llm
        self._sampling = sampling

    def generate(self, number: int) -> Pass:
        """Answer the prompts of one pass."""
        from vllm import SamplingParams

        prompts = self._task.pass_prompts(number)
        inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        start = time.perf_counter()
        params: Any = SamplingParams(**self._sampling)
        if self._task.case.seeds:
            params = [
                SamplingParams(**self._sampling, seed=self._seed(number, row))
                for row in range(len(prompts))
            ]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        completions = [one for output in outputs for one in output.outputs]
        return Pass(seconds, len(completions), sum(len(one.token_ids) for one in completions))

    def _seed(self, number: int, row: int) -> int:
        options = self._task.options
        ordinal = (number * options.prompts + row) * options.completions
        return sample_seed(options.seed, ordinal, is_eval=False)

    def stream(self, prompts: list[Prompt], completions: int, first: int = 0) -> Stopwatch:
        """See measure.Stream: step the engine until all are answered."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        sampling = self._sampling | {"n": 1, "output_kind": RequestOutputKind.DELTA}
        watch = Stopwatch()
        for row in range(len(prompts) * completions):
            seed = {"seed": first * completions + row} if self._task.case.seeds else {}
            engine.add_request(
                str(row),
                {"prompt_token_ids": prompts[row // completions].token_ids},
                SamplingParams(**sampling, **seed),
            )
        while engine.has_unfinished_requests():
            for output in engine.step():
                watch.tokens(output.request_id, len(output.outputs[0].token_ids))
        return watch
