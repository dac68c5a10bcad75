"""Train as a strategy file says:  python examples/megatron/entry/train_rlvr.py -c FILE [key=value]

With GRPO or REINFORCE++ (adv_estimator grpo, reinforce) or PPO (gae), on any number of rewards.
Copy this file to start a job of your own: say which class plays which role of the yaml.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for `examples`

import chatlearn_vllm
from chatlearn_vllm import (
    BaseModule,
    Evaluator,
    GRPOEngine,
    HFRewardModule,
    RewardModule,
    RLHFEngine,
    load_prompts,
)
from chatlearn_vllm.config import JobConfig, ModelConfig, UserError
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.policy_trainer import PolicyTrainer
from examples.megatron.models.tagged_reward import for_tags
from examples.megatron.models.value_model import ValueTrainer
from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference

OWN_CLASSES = {"hf_infer": HFRewardModule, "megatron_infer": RewardModule}
"""Which class scores where a reward names none, by strategy_name."""


def main() -> None:
    job = chatlearn_vllm.init()
    policy = VLLMPolicyInference("policy")
    reference = PolicyReference("reference") if "reference" in job.models else None
    rewards = [
        reward_class(model)(name)
        for name, model in job.models.items()
        if name.startswith("reward_")
    ]
    engine: GRPOEngine | RLHFEngine
    if "ppo_value" in job.models:
        # The value model that is trained scores, too.
        ppo_policy, ppo_value = PolicyTrainer("ppo_policy"), ValueTrainer("ppo_value")
        engine = RLHFEngine(policy, reference, rewards, None, ppo_policy, ppo_value)
    else:
        engine = GRPOEngine(policy, reference, rewards, PolicyTrainer("policy_trainer"))

    args, key = job.runtime, policy.model_args.prompt_key
    if not args.data_path:
        raise UserError(
            "actor_train.data_args.file_name must name the prompts: a jsonl file, or a list"
        )
    prompts = load_prompts(args.data_path, args.training_data_num_limit, key)
    check_tags(job, prompts, args.data_path)
    engine.set_dataset(prompts)
    if args.eval_data_path:
        eval_prompts = load_prompts(args.eval_data_path, args.eval_data_num_limit, key)
        check_tags(job, eval_prompts, args.eval_data_path)
        engine.set_evaluator(Evaluator(policy, rewards, eval_prompts))
    engine.learn()


def check_tags(job: JobConfig, prompts: list[dict[str, Any]], files: object) -> None:
    """Check that records say what rewards for some of them choose by.

    Args:
        job: with the rewards.
        prompts: records; None stands for what a line did not have.
        files: they are from, for the message.

    Raises:
        UserError: one has no tag.
    """
    for name, model in job.models.items():
        args = model.model_args.user_args
        if not args.get("tag_included"):
            continue
        tag = args.get("tag", "tag")
        tags = [record.get(tag) for record in prompts]
        number = tags.index(None) if None in tags else None
        if number is not None:
            raise UserError(
                f"rewards.{name.removeprefix('reward_')}.tag_included={args['tag_included']}: "
                f"record {number + 1} of {files} has no `{tag}`; say in "
                "actor_train.data_args.tag which field it is, or leave tag_included out"
            )


def reward_class(model: ModelConfig) -> type[BaseModule]:
    """The class of an entry of `rewards`: its worker_cls, else that of its strategy.

    Raises:
        UserError: it names no class, or one that cannot score here.
    """
    args = model.model_args.user_args
    role = f"rewards.{model.name.removeprefix('reward_')}"
    name = args.get("worker_cls")
    remedy = (
        "name a class of yours as package.module.Class: a chatlearn_vllm.BaseModule whose "
        "forward_step returns `rewards`, such as "
        "examples.megatron.models.arithmetic_reward.ArithmeticReward"
    )
    if name is None:
        found = OWN_CLASSES.get(args.get("strategy_name", ""))
        if found is None:
            raise UserError(f"{role}: no worker_cls says how it scores; {remedy}")
    else:
        module, _, class_name = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), class_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"{role}.worker_cls={name}: {error}; {remedy}") from None
        if not (isinstance(found, type) and issubclass(found, BaseModule)):
            raise UserError(f"{role}.worker_cls={name} is no BaseModule; {remedy}")
    return for_tags(found) if args.get("tag_included") else found


if __name__ == "__main__":
    main()
