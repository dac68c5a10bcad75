"""Does a whole job go on with responses that an episode left unfinished, also after a resume?"""

import torch

from chatlearn_vllm.data.carried import Begun, Carried
from chatlearn_vllm.runtime import session
from chatlearn_vllm.runtime.grpo_engine import GRPOEngine
from tests.helpers.toy_modules import (
    PROMPTS,
    ToyPolicy,
    ToyReward,
    ToyTrainer,
    calls_of,
    write_job,
)


class SlowForSome(ToyPolicy):
    """Answers a prompt in six steps, every fourth one in a thousand; a token per step."""

    running = ()

    def generate(
        self, prompt_indices, first_sample, iteration=0, is_eval=False, min_finished=None,
        max_steps=None, carried=(),
    ):  # fmt: skip
        if is_eval:
            return super().generate(prompt_indices, first_sample, iteration, is_eval)
        if carried:
            asked = (f"{one.prompt_index}:{len(one.responses)}" for one in carried)
            self.note(f"generate {','.join(asked)}")
        for one in carried:
            one.responses = one.responses or [Begun() for _ in range(4)]
        self.running = [*self.running, *carried]
        done = []
        for _ in range(max_steps or 10**6):
            for begun in (begun for one in self.running for begun in one.responses):
                begun.token_ids.append(3)
                begun.versions.append(self.version)
                begun.logprobs.append(-1.0)
            done += [one for one in self.running if self._is_done(one)]
            self.running = [one for one in self.running if one not in done]
            if len(done) >= min(min_finished or 10**9, len(done) + len(self.running)):
                break
        return self._batch([(one, copy) for one in done for copy in range(4)]) if done else None

    def cut(self):
        left, self.running = self.running, []
        return [Carried(one.prompt_index, one.first_sample, 0, one.responses) for one in left]

    def _is_done(self, one):
        return len(one.responses[0].token_ids) >= (6 if one.prompt_index % 4 else 1000)

    def _batch(self, rows):
        mask = torch.zeros(len(rows), 8)
        mask[:, 2:] = 1
        return {
            "all_tokens": torch.full((len(rows), 8), 3),
            "logprobs": -mask[:, 1:],
            "loss_mask": mask,
            "no_padded_query_ids": [torch.zeros(2)] * len(rows),
            "str_prompts": ["question"] * len(rows),
            "str_outputs": ["answer"] * len(rows),
            "answer": [one.prompt_index for one, _ in rows],
            "prompt_index": torch.tensor([one.prompt_index for one, _ in rows]),
            "sample_index": torch.tensor([one.first_sample + copy for one, copy in rows]),
            "weight_version": torch.full((len(rows),), self.version),
            "token_versions": torch.full((len(rows), 7), self.version),
            "begun": [one.responses[copy] for one, copy in rows],
        }


def run(path, num_episode):
    keys = {
        "runtime.num_episode": num_episode, "runtime.max_rollout_round": 3,
        "runtime.rollout_over_sampling": 0.5, "runtime.save_episode_interval": 1,
        "runtime.sample_per_episode": 16, "runtime.data_shuffle": False, "models.policy.num_gpu": 1,
        "models.policy_trainer.num_gpu": 1,
    }  # fmt: skip
    session.init(str(path), [f"{key}={value}" for key, value in keys.items()])
    modules = SlowForSome("policy"), None, ToyReward("reward"), ToyTrainer("policy_trainer")
    return GRPOEngine(*modules).set_dataset(PROMPTS)


def test_an_episode_asks_for_more_prompts_than_it_needs_and_goes_on_with_the_rest(
    existing_cluster, tmp_path
):
    path = write_job(tmp_path)
    first = run(path, 2).learn()
    engine = run(path, 4)
    episodes = [line for line in first + engine.learn() if line["episode"] > 0]

    assert [line["rollout/num_carried_prompts"] for line in episodes] == [2, 2, 2, 2]
    assert [line["rollout/num_samples"] for line in episodes] == [16] * 4
    asked = [call.split()[-1] for call in calls_of(engine.run_dir) if "policy generate" in call]
    # Four prompts make an episode's samples; six are worked on. Those with responses were begun.
    assert [one for one in asked if ":" in one] == [
        "0:0,1:0,2:0,3:0,4:0,5:0",
        "0:4,4:4,6:0,7:0,8:0,9:0",
        "8:4,9:4,10:0,11:0,12:0,13:0",
        "12:4,13:4,14:0,15:0,0:0,1:0",
    ]
