"""Train a reward model on pairs:  python examples/megatron/entry/train_reward.py -c JOB.yaml"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for `examples`

import chatlearn_vllm
from chatlearn_vllm import RewardEngine, load_prompts
from examples.megatron.models.reward_trainer import RewardTrainer


def main() -> None:
    job = chatlearn_vllm.init()
    engine = RewardEngine(RewardTrainer("reward_trainer"))
    engine.set_dataset(load_prompts(job.runtime.data_path, job.runtime.training_data_num_limit))
    engine.learn()


if __name__ == "__main__":
    main()
