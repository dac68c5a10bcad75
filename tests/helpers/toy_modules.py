"""A whole job in miniature: the policy is a table of token scores, reward counts one token.

The modules follow the runtime's contract with real torch.distributed and real weight-sync plans,
and start in a second. Every call is noted in `run_dir/calls.txt`, so tests can read the order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import torch
import torch.distributed as dist

from chatlearn_vllm.layouts import Block, ListedShards, ParamLayout
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.weight_sync.receiver import WeightReceiver
from chatlearn_vllm.weight_sync.remote import open_links
from chatlearn_vllm.weight_sync.sender import WeightSender

VOCABULARY = 8
CPU = torch.device("cpu")
LINK_TIMEOUT_S = 60.0
GOOD_TOKEN = 3
JOB_YAML = """
models:
  policy:
    num_gpu: 2
    tensor_model_parallel_size: {policy_tp}
    free_memory: True
    model_args: {{seq_length: 8, max_new_tokens: 6, num_inference_per_prompt: 4, seed: 1}}
  policy_trainer:
    num_gpu: 2
    trainable: True
    free_memory: True
    model_args: {{lr: 2.0, init_kl_coef: {kl}}}
  reference:
    num_gpu: 2
    free_memory: True
  reward:
    num_cpu: 1
runtime:
  colocation: ["policy,policy_trainer,reference"]
  num_episode: {num_episode}
  sample_per_episode: 32
  train_micro_batch_size: 4
  train_global_batch_size: 16
  eval_episode_interval: 2
  enable_eval_before_training: True
  output_dir: {output_dir}
  exp_name: toy
"""
PROMPTS = [{"prompt": f"question {number}", "answer": number} for number in range(16)]


def write_job(directory, num_episode=2, policy_tp=1, kl=0.0, extra_runtime=""):
    """Write the toy job's yaml and return its path."""
    path = directory / "job.yaml"
    text = JOB_YAML.format(
        output_dir=directory, num_episode=num_episode, policy_tp=policy_tp, kl=kl
    )
    path.write_text(text + extra_runtime)
    return path


class ToyModule(BaseModule):
    """Joins its replica's process group, and notes calls."""

    def note(self, call):
        self.runtime_args.run_dir.mkdir(parents=True, exist_ok=True)
        with open(self.runtime_args.run_dir / "calls.txt", "a") as file:
            file.write(f"{self.name} {self.replica_id} {self.rank} {call}\n")

    def init(self):
        dist.init_process_group("gloo")

    def model_setup(self):
        self.note("model_setup")

    def onload(self, **parts):
        self.note(" ".join(["onload", *(part for part, chosen in parts.items() if chosen)]))

    def offload(self, **parts):
        self.note(" ".join(["offload", *(part for part, chosen in parts.items() if chosen)]))

    def shutdown(self):
        self.note("shutdown")
        if dist.is_initialized():
            dist.destroy_process_group()


class ToyTarget(ToyModule):
    """Gets a trainer's scores; each rank of a replica holds a slice of them."""

    def model_setup(self):
        super().model_setup()
        self.width = VOCABULARY // self.world_size
        self.scores = torch.full((self.width,), float("nan"))
        self.version = None

    def weight_gpu(self):
        return None, frozenset()

    def weight_shards(self, num_replicas):
        layouts = {}
        for rank in range(num_replicas * self.world_size):
            first = rank % self.world_size * self.width
            block = Block("scores", ((first, first + self.width),), ((0, self.width),))
            layouts[rank] = [ParamLayout("scores", (self.width,), (block,))]
        return ListedShards(layouts)

    def weight_dtypes(self):
        return {"scores": self.scores.dtype}

    def plan_weight_sync(self, rank, sources, targets, links):
        self.receiver = WeightReceiver(rank)
        return self.receiver.plan(sources, targets, links)

    def connect_weight_links(self, addresses):
        self.receiver.connect(
            open_links(addresses, is_sender=False, device=CPU, timeout_s=LINK_TIMEOUT_S)
        )

    def import_weights(self, source_ranks, keep_open, sample, *exports):
        self.note("import_weights")
        self.version = None
        with self.receiver.all_or_none():
            self.receiver.open(dict(zip(source_ranks, exports, strict=True)))
            self.receiver.pull({"scores": self.scores}, sample=sample)

    def finish_weight_sync(self, version, source_ranks, *sent):
        self.note(f"finish_weight_sync {version}")
        arrival = self.receiver.compare(dict(zip(source_ranks, sent, strict=True)))
        if arrival.is_good:
            self.version = version
        return arrival

    def revoke_weight_sync(self, version):
        if self.version == version:
            self.version = None


class ToyPolicy(ToyTarget):
    """Samples tokens from softmax(scores)."""

    def model_setup(self):
        super().model_setup()
        self.records = {}

    def build_prompts(self, prompts, is_eval=False):
        self.records[is_eval] = prompts
        return len(prompts)

    def generate(self, prompt_indices, first_sample, iteration=0, is_eval=False, min_finished=None):
        if not prompt_indices:
            return None
        self.note(f"generate {'eval' if is_eval else 'train'} {first_sample}")
        slices = [torch.empty(self.width) for _ in range(self.world_size)]
        dist.all_gather(slices, self.scores)
        if self.rank != 0:
            return None
        copies = 1 if is_eval else self.model_args.responses_per_prompt
        rows = [index for index in prompt_indices for _ in range(copies)]
        seq_length, num_prompt = self.model_args.seq_length, 2
        generator = torch.Generator().manual_seed(self.model_args.seed + first_sample)
        distribution = torch.cat(slices).log_softmax(0)
        tokens = torch.zeros(len(rows), seq_length, dtype=torch.int64)
        tokens[:, num_prompt:] = torch.multinomial(
            distribution.exp().expand(len(rows), -1),
            seq_length - num_prompt,
            replacement=True,
            generator=generator,
        )
        mask = torch.zeros(len(rows), seq_length)
        mask[:, num_prompt:] = 1.0
        return {
            "all_tokens": tokens,
            "logprobs": distribution[tokens][:, 1:] * mask[:, 1:],
            "loss_mask": mask,
            "no_padded_query_ids": [tokens[row, :num_prompt] for row in range(len(rows))],
            "str_prompts": [self.records[is_eval][index]["prompt"] for index in rows],
            "str_outputs": [str(row) for row in tokens[:, num_prompt:].tolist()],
            "answer": [self.records[is_eval][index]["answer"] for index in rows],
            "prompt_index": torch.tensor(rows),
            "sample_index": first_sample + torch.arange(len(rows)),
            "weight_version": torch.full((len(rows),), self.version),
        }

    def sleep(self):
        self.note("sleep")
        if self.model_args.sleep_level == 2:
            self.scores.fill_(float("nan"))

    def wake_weights(self):
        self.note("wake_weights")

    def wake_kv_cache(self):
        self.note("wake_kv_cache")


class UnevenPolicy(ToyPolicy):
    """Responses of one to five tokens."""

    def generate(self, prompt_indices, first_sample, iteration=0, is_eval=False, min_finished=None):
        batch = super().generate(prompt_indices, first_sample, iteration, is_eval)
        if batch is None:
            return None
        ends = 3 + batch["sample_index"] % 5
        is_padding = torch.arange(self.model_args.seq_length) >= ends[:, None]
        for key in ("all_tokens", "loss_mask"):
            batch[key] = batch[key].masked_fill(is_padding, 0)
        batch["logprobs"] = batch["logprobs"].masked_fill(is_padding[:, 1:], 0.0)
        return batch


def predicted_values(scores, data):
    """[B, S-1]: entry t is the score of token t, the last one before token t+1 is sampled."""
    return scores[data["all_tokens"]][:, :-1] * data["loss_mask"][:, 1:]


class ToyValue(ToyTarget):
    """A value model: predicts the score of the last token."""

    def forward_step(self, data, iteration=0):
        self.note(f"forward_step {len(data['all_tokens'])}")
        assert self.version is not None, "a weight sync is half done"
        return {"values": predicted_values(self.scores, data)}


class ToyTrainer(ToyModule):
    """Policy gradient on the scores, data parallel."""

    num_moves = 0
    """Of the scores in memory; the toy leaves it to tests."""

    def model_setup(self):
        super().model_setup()
        self.scores = torch.zeros(VOCABULARY)

    @property
    def data_parallel_rank(self):
        return self.rank

    @property
    def data_parallel_size(self):
        return self.world_size

    def train(self, data, iteration=0):
        self.note(f"train {len(data['all_tokens'])}")
        rows = self.runtime_args.train_global_batch_size // self.data_parallel_size
        return [
            self._step({key: value[start : start + rows] for key, value in data.items()})
            for start in range(0, len(data["all_tokens"]), rows)
        ]

    def _step(self, batch):
        scores = self.scores.clone().requires_grad_()
        mask = batch["loss_mask"][:, 1:]
        logprobs = scores.log_softmax(0)[batch["all_tokens"]][:, 1:] * mask
        advantages = batch["advantages"]
        if advantages.dim() == 1:
            advantages = advantages[:, None]  # [B] -> [B, 1]
        loss = -(advantages * logprobs).sum() / mask.sum()
        loss.backward()
        dist.all_reduce(scores.grad)
        self.scores -= self.model_args.lr * scores.grad / self.data_parallel_size
        difference = (logprobs.detach() - batch["logprobs"]).abs().sum() / mask.sum()
        return {"loss": loss.item(), "logprob_abs_diff_mean": difference.item()}

    def train_records(self, records, iteration=0):
        self.note("train_records " + ",".join(record["prompt"] for record in records))
        return [{"loss": 1.0 / iteration}]

    def weight_gpu(self):
        return None, frozenset()

    def weight_shards(self):
        whole = ((0, VOCABULARY),)
        layout = ParamLayout("scores", (VOCABULARY,), (Block("scores", whole, whole),))
        return ListedShards(dict.fromkeys(range(self.world_size), [layout]))

    def plan_weight_sync(self, sources, targets, links, target_dtypes):
        self.sender = WeightSender(
            self.rank, lambda: {"scores": self.scores}, lambda: self.num_moves
        )
        return self.sender.plan(sources, targets, links, target_dtypes)

    def listen_for_weight_links(self):
        return self.sender.listen()

    def connect_weight_links(self, addresses):
        self.sender.connect(
            open_links(addresses, is_sender=True, device=CPU, timeout_s=LINK_TIMEOUT_S)
        )

    def send_weights(self):
        self.sender.send()

    def export_weights(self):
        self.note("export_weights")
        return self.sender.export()

    def sent_weights(self, sample):
        return self.sender.sent(sample)

    def save_checkpoint(self, iteration):
        self.note(f"save_checkpoint {iteration}")
        if self.rank == 0:
            torch.save(self.scores, self.runtime_args.run_dir / f"{self.name}_{iteration}.pt")

    def load_checkpoint(self, iteration=None):
        self.note(f"load_checkpoint {iteration}")
        self.scores = torch.load(self.runtime_args.run_dir / f"{self.name}_{iteration}.pt")
        return iteration


class ToyValueTrainer(ToyTrainer):
    """Least squares on the values, data parallel; can also score."""

    def model_setup(self):
        super().model_setup()
        self.scores = torch.linspace(-0.5, 0.5, VOCABULARY)

    def forward_step(self, data, iteration=0):
        self.note(f"forward_step {len(data['all_tokens'])}")
        return {"values": predicted_values(self.scores, data)}

    def _step(self, batch):
        scores = self.scores.clone().requires_grad_()
        num_tokens = batch["loss_mask"].sum()
        errors = predicted_values(scores, batch) - batch["returns"]
        loss = errors.square().sum() / num_tokens
        loss.backward()
        dist.all_reduce(scores.grad)
        self.scores -= self.model_args.lr * scores.grad / self.data_parallel_size
        return {"loss": loss.item()}


class KeepsRows:
    """Mixed into a trainer: `rows_trained_on` reads what each rank was trained on."""

    def train(self, data, iteration=0):
        path = self.runtime_args.run_dir / f"{self.name}_rows_{iteration}_{self.rank}.pt"
        torch.save({"rows": data, "scores": self.scores}, path)
        return super().train(data, iteration)


def rows_trained_on(run_dir, name, episode):
    """Rows by rank of a trainer that `KeepsRows`, and its scores before it was trained on them."""
    paths = sorted(run_dir.glob(f"{name}_rows_{episode}_*.pt"))
    kept = [torch.load(path) for path in paths]
    return [one["rows"] for one in kept], kept[0]["scores"]


def calls_of(run_dir, *, replica=0, rank=0):
    """`<model> <call>` of one rank of each model, in order."""
    lines = [line.split() for line in (run_dir / "calls.txt").read_text().splitlines()]
    return [
        " ".join((name, *call))
        for name, own_replica, own_rank, *call in lines
        if (own_replica, own_rank) == (str(replica), str(rank))
    ]


class ToyReference(ToyModule):
    """A uniform distribution."""

    def forward_step(self, data, iteration=0):
        self.note("forward_step")
        return {"ref_logprobs": torch.full_like(data["logprobs"], -2.0)}


class ToyReward(ToyModule):
    """Share of good tokens; a sample is right if at least half of its tokens are good."""

    def forward_step(self, data, iteration=0):
        self.note(f"forward_step {len(data['answer'])}")
        good = ((data["all_tokens"] == GOOD_TOKEN) * data["loss_mask"]).sum(1)
        rewards = good / data["loss_mask"].sum(1)
        return {"rewards": rewards, "accuracy": (rewards >= 0.5).float()}


class RaisingTrainer(ToyTrainer):
    """Rank 1 raises in the second episode while rank 0 waits for it in a collective."""

    def train(self, data, iteration=0):
        if iteration == 2 and self.rank == 1:
            raise ValueError("a bad batch")
        return super().train(data, iteration)


class TooLargeTrainer(ToyTrainer):
    """Finds no room on its device."""

    def train(self, data, iteration=0):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1022.00 MiB.")

    def memory_keys(self):
        return ["model_args.seq_length: 8 -> 4"]


class DyingTrainer(ToyTrainer):
    """Rank 1 is killed in the second episode, as the kernel does when memory runs out."""

    def train(self, data, iteration=0):
        if iteration == 2 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train(data, iteration)


class SlowReward(ToyReward):
    """Takes forever, with a child process running."""

    def forward_step(self, data, iteration=0):
        child = subprocess.Popen(["sleep", "600"])
        self.note(f"child {child.pid}")
        time.sleep(600)


class BrokenReward(ToyReward):
    """Cannot be set up."""

    def model_setup(self):
        raise RuntimeError("no such file: rules.txt")
