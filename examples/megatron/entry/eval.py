"""Evaluate a policy:  python examples/megatron/entry/eval.py -c JOB.yaml [key=value]

Copy this file to start a job of your own: say which class plays which role of the yaml.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for `examples`

import chatlearn_vllm
from chatlearn_vllm import EvalEngine, load_prompts
from examples.megatron.models.arithmetic_reward import ArithmeticReward
from examples.megatron.models.reward_inference import RewardInference
from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference


def main() -> None:
    job = chatlearn_vllm.init()
    policy = VLLMPolicyInference("policy")
    # A model that scores on a device, or a rule on a CPU.
    reward_class = RewardInference if job.models["reward"].num_gpu else ArithmeticReward
    reward = reward_class("reward")

    def eval_flow(prompts: Any) -> Any:
        answers = policy.eval_forward(prompts)
        return reward.eval_forward(answers)

    args, key = job.runtime, policy.model_args.prompt_key
    prompts = load_prompts(args.eval_data_path, args.eval_data_num_limit, key)
    EvalEngine(eval_flow).set_dataset(prompts).eval()


if __name__ == "__main__":
    main()
