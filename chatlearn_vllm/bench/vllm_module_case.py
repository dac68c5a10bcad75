"""How fast is vLLM through VLLMModule, driven as a job drives it?

One process per rank, as in a job; there, Ray starts them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from chatlearn_vllm.bench.measure import Pass, Stopwatch, latencies, throughput
from chatlearn_vllm.bench.vllm_arguments import make_job, speculation
from chatlearn_vllm.bench.workload import model_config
from chatlearn_vllm.data.carried import Begun
from chatlearn_vllm.data.prompts import PromptPipeline
from chatlearn_vllm.data.seeds import sample_seed
from chatlearn_vllm.modules.vllm_module import VLLMModule

if TYPE_CHECKING:
    from chatlearn_vllm.bench.child import Task
    from chatlearn_vllm.bench.workload import Prompt
    from chatlearn_vllm.config import JobConfig


class _Prompts(PromptPipeline):
    """Prompts that are token ids already."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.data = [{"input_ids": one.token_ids, "prompt": one.text} for one in prompts]


class Policy(VLLMModule):
    """Every hook with its default, but for the dataset."""

    def build_dataset(self, train_prompts: list[Prompt], is_eval: bool = False) -> _Prompts:
        return _Prompts(train_prompts)

    def model_provider(self) -> Any:
        return super().model_provider()

    def _add_request(self, data: dict[str, list], is_eval: bool = False) -> Any:
        return super()._add_request(data, is_eval=is_eval)

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> Any:
        return super().forward_step(data, iteration)

    def decode_internal(self, batched_outputs: list[Any]) -> dict[str, Any]:
        return super().decode_internal(batched_outputs)


def ready_policy(task: Task, job: JobConfig) -> Policy:
    """A policy that can generate, with the prompts of all passes; collective over its ranks."""
    policy = Policy("policy", job)
    policy.init()
    policy.model_setup()
    numbers = range(task.options.repeat + task.options.warmup)
    policy.build_prompts([prompt for n in numbers for prompt in task.pass_prompts(n)])
    if not policy.engine_state().startswith("READY"):  # dummy weights count as arrived
        policy.engine.begin_weight_update()
        policy.engine.finish_weight_update(0)
    return policy


def measure(task: Task) -> dict[str, Any]:
    """Measure one case of VLLMModule; collective over its ranks.

    Returns:
        The case's part of the results; of use on the first rank.
    """
    import torch

    from chatlearn_vllm.engines.vllm_arguments import engine_arguments, sampling_arguments
    from chatlearn_vllm.layouts import ModelShape

    options = task.options
    task.phase("load")
    start = time.perf_counter()
    job = make_job(task)
    policy = ready_policy(task, job)
    load_s = time.perf_counter() - start

    measured = _MeasuredPolicy(task, policy)
    try:
        task.phase("warmup")
        for number in range(options.warmup):
            measured.generate(options.repeat + number)
        task.phase("throughput")
        before = policy.engine.metrics()
        passes = [measured.generate(number) for number in range(options.repeat)]
        after = policy.engine.metrics()
        args = policy.model_args
        shape = ModelShape.from_hf_config(model_config(task.model_dir))
        arguments, notices = engine_arguments(
            args, task.model_dir, shape, seed=args.seed, on_gpu=torch.cuda.is_available()
        )
        drafts = {name: value - before.get(name, 0.0) for name, value in after.items()}
        result = {
            "load_s": load_s,
            "throughput": throughput(passes, options.num_completions),
            "latency": None,
            "speculation": speculation(job, drafts),
            "engine_arguments": arguments,
            "sampling": sampling_arguments(args, is_eval=False)
            | {"seed": "one per request" if policy.engine.seed_per_response else "one per pass"},
            "notices": notices,
            "memory_phases": ["throughput"],
        }
        if options.latency_requests:
            task.phase("latency")
            result["latency"] = latencies(
                measured.stream, *task.latency_prompts(), options.completions
            )
        return result
    finally:
        policy.shutdown()


class _MeasuredPolicy:
    """A policy, and what is asked of it; every rank asks the same."""

    def __init__(self, task: Task, policy: Policy) -> None:
        self._task = task
        self._policy = policy

    def _rows(self, number: int) -> list[int]:
        """Rows of the dataset that hold the prompts of a pass."""
        num_prompts = self._task.options.prompts
        return list(range(number * num_prompts, (number + 1) * num_prompts))

    def generate(self, number: int) -> Pass:
        """Answer the prompts of one pass."""
        import torch

        first_sample = number * self._task.options.num_completions
        torch.distributed.all_reduce(torch.zeros(1))  # the ranks begin together
        start = time.perf_counter()
        batch = self._policy.generate(self._rows(number), first_sample)
        seconds = time.perf_counter() - start
        if batch is None:  # not the first rank, whose numbers count
            return Pass(seconds, 1, 0)
        return Pass(seconds, len(batch["loss_mask"]), int(batch["loss_mask"].sum()))

    def stream(self, prompts: list[Prompt], completions: int, first: int = 0) -> Stopwatch:
        """See measure.Stream: step the engine until all are answered."""
        from chatlearn_vllm.engines.vllm_arguments import max_response_tokens, sampling_arguments
        from chatlearn_vllm.engines.vllm_partial import PartialRequest

        args, engine = self._policy.model_args, self._policy.engine
        sampling = sampling_arguments(args, is_eval=False) | {"n": completions}
        watch = Stopwatch()
        responses: dict[tuple[int, int], Begun] = {}
        for row, prompt in enumerate(prompts):
            begun = [Begun() for _ in range(completions)]
            responses |= {(row, copy): one for copy, one in enumerate(begun)}
            request = {
                "max_tokens": max_response_tokens(args, len(prompt.token_ids)),
                "seed": sample_seed(args.seed, (first + row) * completions, is_eval=False),
            }
            engine.add_partial_request(
                PartialRequest(str(row), prompt.text, prompt.token_ids, request | sampling, begun)
            )
        seen = dict.fromkeys(responses, 0)
        while engine.requests:
            engine.run(max_steps=1)
            for key, one in responses.items():
                if (length := len(one.token_ids)) > seen[key]:
                    watch.tokens(key, length - seen[key])
                    seen[key] = length
        return watch
