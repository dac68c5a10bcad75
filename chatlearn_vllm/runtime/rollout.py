"""How do prompts become scored samples, over all replicas of a policy?"""

from __future__ import annotations

from collections.abc import Sequence

from chatlearn_vllm.data.batch import Batch, concat
from chatlearn_vllm.runtime.scatter import split_evenly
from chatlearn_vllm.runtime.worker_group import WorkerGroup


def generate(
    policy: WorkerGroup,
    prompt_indices: Sequence[int],
    first_sample: int,
    samples_per_prompt: int,
    iteration: int,
    is_eval: bool = False,
) -> Batch:
    """Answer prompts, each replica a consecutive share of them.

    Args:
        policy: ranks of a `VLLMModule`.
        prompt_indices: rows of the training or evaluation prompts.
        first_sample: ordinal of the first sample; replicas and episodes must not share ordinals,
            because seeds derive from them.
        samples_per_prompt: responses that each prompt gets.
        iteration: episode.
        is_eval: evaluation prompts and sampling keys.

    Returns:
        One batch; samples in the order of `prompt_indices`, those of a prompt adjacent.
    """
    shares = split_evenly(prompt_indices, min(len(policy.replicas), len(prompt_indices)))
    arguments = []
    for share in shares:
        arguments.append((list(share), first_sample, iteration, is_eval))
        first_sample += len(share) * samples_per_prompt
    return concat(policy.call_replicas("generate", arguments))


def check_weight_version(batch: Batch, expected: int) -> None:
    """Check that every sample was made with the weights that the driver believes are in place.

    Raises:
        RuntimeError: some samples have another version.
    """
    versions = batch["weight_version"].tolist()
    wrong = sorted({version for version in versions if version != expected})
    if wrong:
        raise RuntimeError(
            f"{sum(version != expected for version in versions)} of {len(versions)} samples were "
            f"made with weight version {wrong}, the trainer's last sync was version {expected}"
        )
