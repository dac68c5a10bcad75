"""Train with Online DPO:  python examples/megatron/entry/train_online_dpo.py -c JOB.yaml

Copy this file to start a job of your own: say which class plays which role of the yaml.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for `examples`

import chatlearn_vllm
from chatlearn_vllm import Evaluator, OnlineDPOEngine, load_prompts
from examples.megatron.models.arithmetic_reward import ArithmeticReward
from examples.megatron.models.online_dpo_trainer import OnlineDPOTrainer
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.reward_inference import RewardInference
from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference


def main() -> None:
    job = chatlearn_vllm.init()
    policy = VLLMPolicyInference("policy")
    reference = PolicyReference("reference")
    # A model that scores on a device, or a rule on a CPU.
    reward_class = RewardInference if job.models["reward"].num_gpu else ArithmeticReward
    reward = reward_class("reward")
    # ChatLearn's own files call it ppo_policy.
    name = "policy_trainer" if "policy_trainer" in job.models else "ppo_policy"
    policy_trainer = OnlineDPOTrainer(name)

    engine = OnlineDPOEngine(policy, reference, reward, policy_trainer)
    args, key = job.runtime, policy.model_args.prompt_key
    engine.set_dataset(load_prompts(args.data_path, args.training_data_num_limit, key))
    if args.eval_data_path:
        eval_prompts = load_prompts(args.eval_data_path, args.eval_data_num_limit, key)
        engine.set_evaluator(Evaluator(policy, reward, eval_prompts))
    engine.learn()


if __name__ == "__main__":
    main()
