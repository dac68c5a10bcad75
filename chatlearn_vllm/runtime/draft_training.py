"""Can the model that drafts for a policy be trained with it?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatlearn_vllm.config.model_files import read_config_json
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.layouts import ModelShape
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.draft_module import DraftModule


def check_draft_trainer(policy: BaseModule, trainer: BaseModule) -> None:
    """Check that a policy drafts with the model that a trainer trains.

    Raises:
        UserError: it does not; lists why.
    """
    problems = [
        *_problems_of_trainer(trainer),
        *_problems_of_policy(policy, trainer),
        *_problems_of_shapes(policy, trainer),
    ]
    if problems:
        raise UserError("draft_trainer: " + "\n  ".join(problems))


def check_draft_without_trainer(policy: BaseModule) -> None:
    """Check that a policy's draft does not wait for weights that nobody sends.

    Raises:
        UserError: it does.
    """
    config = policy.model_args.speculative_config or {}
    if (config.get("draft_load_config") or {}).get("load_format") == "dummy":
        raise UserError(
            f"models.{policy.name}: speculative_config.draft_load_config: load_format: dummy waits "
            "for the weights of a draft_trainer, and the engine was given none; leave it out to "
            f"read those in {config.get('model')}"
        )


def _problems_of_trainer(trainer: BaseModule) -> Iterator[str]:
    if not isinstance(trainer, DraftModule):
        yield (
            f"models.{trainer.name} is a {type(trainer).__name__}, which learns something else "
            "than the policy's responses; make it a DraftModule, or a subclass"
        )
    if not trainer.module_args.trainable:
        yield f"models.{trainer.name}: trainable=False must be True; a frozen draft has no trainer"


def _problems_of_policy(policy: BaseModule, trainer: BaseModule) -> Iterator[str]:
    args, at = policy.model_args, f"models.{policy.name}"
    without = f"or give the engine no draft_trainer (models.{trainer.name})"
    if args.inference_engine != "vllm":
        yield (
            f"{at}: inference_engine={args.inference_engine} drafts with no model of this job; set "
            f"inference_engine: vllm, {without}"
        )
        return
    config = args.speculative_config
    if config is None:
        yield (
            f"{at}: speculative_config is not set, so nothing drafts; set method: draft_model, "
            f"model: {trainer.model_args.load} and num_speculative_tokens in it, {without}"
        )
        return
    if config["method"] != "draft_model":
        yield (
            f"{at}: speculative_config.method={config['method']} must be draft_model: a draft of "
            f"another kind is no model that megatron-core trains; {without[3:]} otherwise"
        )
    if config.get("use_heterogeneous_vocab"):
        yield (
            f"{at}: speculative_config.use_heterogeneous_vocab=True must be False: a draft with a "
            "tokenizer of its own cannot learn the policy's tokens; take one with the policy's"
        )
    quantized = config.get("quantization") or _config_of_draft(config).get("quantization_config")
    if quantized and config.get("quantization") != "fp8":
        yield (
            f"{at}: the draft in speculative_config is quantised ({quantized}), and the weights "
            "that its trainer sends are not; set its model to the one that is trained, with "
            "quantization: fp8 in speculative_config where it should draft with quantised weights"
        )


def _problems_of_shapes(policy: BaseModule, trainer: BaseModule) -> Iterator[str]:
    """Of the two config.json, as far as they can be read; other checks name what is missing."""
    config = policy.model_args.speculative_config or {}
    trained = read_config_json(trainer.model_args.load)
    drafting = _config_of_draft(config)
    if not trained or not drafting or config.get("method") != "draft_model":
        return
    key = f"models.{policy.name}: speculative_config.model={config['model']}"
    shapes = []
    for where, one in ((f"models.{trainer.name}: load", trained), (key, drafting)):
        try:
            shapes.append(ModelShape.from_hf_config(one))
        except ValueError as error:
            yield f"{where}: {error}; take a draft of a family that has one"
    if len(shapes) < 2:
        return
    different = [
        f"{name} {of_draft} instead of {of_trainer}"
        for name, of_trainer in vars(shapes[0]).items()
        if (of_draft := getattr(shapes[1], name)) != of_trainer
    ]
    if different:
        yield (
            f"{key} is another model than the one that is trained, models.{trainer.name}: "
            f"load={trainer.model_args.load} ({', '.join(different)}); name the same directory in "
            "both, or one with the same config.json"
        )


def _config_of_draft(config: dict[str, Any]) -> dict[str, Any]:
    directory = config.get("model")
    return read_config_json(directory) if isinstance(directory, str | Path) else {}
