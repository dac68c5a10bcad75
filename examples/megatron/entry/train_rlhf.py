"""Train a policy with PPO:  python examples/megatron/entry/train_rlhf.py -c JOB.yaml [key=value]

Copy this file to start a job of your own: say which class plays which role of the yaml.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for `examples`

import chatlearn_vllm
from chatlearn_vllm import Evaluator, RLHFEngine, load_prompts
from examples.megatron.models.arithmetic_reward import ArithmeticReward
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.policy_trainer import PolicyTrainer
from examples.megatron.models.reward_inference import RewardInference
from examples.megatron.models.value_model import ValueInference, ValueTrainer
from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference


def main() -> None:
    job = chatlearn_vllm.init()
    policy = VLLMPolicyInference("policy")
    reference = PolicyReference("reference") if "reference" in job.models else None
    # A model that scores on a device, or a rule on a CPU.
    reward_class = RewardInference if job.models["reward"].num_gpu else ArithmeticReward
    reward = reward_class("reward")
    # Without a copy of its own to score with, the value model that is trained does it.
    value = ValueInference("value") if "value" in job.models else None
    ppo_policy = PolicyTrainer("ppo_policy")
    ppo_value = ValueTrainer("ppo_value")

    engine = RLHFEngine(policy, reference, reward, value, ppo_policy, ppo_value)
    args, key = job.runtime, policy.model_args.prompt_key
    engine.set_dataset(load_prompts(args.data_path, args.training_data_num_limit, key))
    if args.eval_data_path:
        eval_prompts = load_prompts(args.eval_data_path, args.eval_data_num_limit, key)
        engine.set_evaluator(Evaluator(policy, reward, eval_prompts))
    engine.learn()


if __name__ == "__main__":
    main()
