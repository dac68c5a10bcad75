"""Can a model's layers and experts be spread over its ranks as its keys say?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlearn_vllm.config.model_files import read_config_json

if TYPE_CHECKING:
    from chatlearn_vllm.config.checks import Reporter
    from chatlearn_vllm.config.problems import Key
    from chatlearn_vllm.config.schema import ModelConfig


def check_layers(model: ModelConfig, layers: int | None, report: Reporter) -> None:
    """Check that a trainable model's layers can be spread over its pipeline stages.

    Args:
        model: the model.
        layers: number of its layers, None if unknown.
        report: told of every broken rule.
    """
    args, at = model.model_args, ("models", model.name, "model_args")
    pp, virtual = model.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    keys = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    given = {key: args[key] for key in keys if args[key] is not None}
    # vLLM takes stages of different depth, megatron-core wants them equal but for these two.
    if not model.trainable or layers is None:
        return
    if not given:
        report.require(
            layers % (pp * virtual) == 0,
            (*at, "num_layers"),
            f"{layers} layers of a trainable model must be a multiple of its {pp * virtual} "
            "pipeline stages, or name those of the first or last stage by " + " or ".join(keys),
        )
        return
    middle, num_middle = layers - sum(given.values()), pp - len(given)
    if num_middle > 0:
        fits = middle > 0 and middle % (num_middle * virtual) == 0
    else:
        fits = middle == 0 and num_middle == 0
    report.require(
        fits and all(size % virtual == 0 for size in given.values()),
        (*at, next(iter(given))),
        f"leaves {middle} of {layers} layers to {num_middle} of {pp} pipeline stages; these need "
        + ("equally many" if virtual == 1 else f"equally many, each stage a multiple of {virtual}"),
        given=[(*at, key) for key in given],
    )


def sizes_that_divide(number: int) -> str:
    """Those parallel sizes that so many heads can be shared by, as text."""
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)


def check_experts(model: ModelConfig, report: Reporter) -> None:
    """Check that a model's experts can be spread over its ranks."""
    args, at = model.model_args, ("models", model.name)
    key: Key = (*at, "expert_model_parallel_size")
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    ep, etp = model.expert_model_parallel_size, args.expert_tensor_parallel_size
    if ep == 1 and etp is None:
        return
    config = read_config_json(args.load)
    experts = config.get("num_experts") or config.get("num_local_experts")
    report.require(
        not config or bool(experts),
        key if ep > 1 else (*at, "model_args", "expert_tensor_parallel_size"),
        f"needs a model with experts; {args.load}/config.json has no num_experts",
    )
    report.require(not experts or experts % ep == 0, key, f"must divide the {experts} experts")
    report.require(
        model.ranks_per_replica % ((etp or tp) * ep * pp) == 0,
        key,
        f"the {model.ranks_per_replica} ranks of a replica must be a multiple of "
        f"expert_tensor_parallel_size x expert_model_parallel_size x pipeline_model_parallel_size "
        f"= {etp or tp} x {ep} x {pp} (the first is tensor_model_parallel_size where not given)",
    )
