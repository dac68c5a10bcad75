"""Which job does a strategy file describe?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from chatlearn_vllm.config.problems import Key, Problem
from chatlearn_vllm.config.strategies import keys
from chatlearn_vllm.config.strategies.evaluation import Evaluation, max_samples
from chatlearn_vllm.config.strategies.given import Given, Translation
from chatlearn_vllm.config.strategies.lengths import Lengths
from chatlearn_vllm.config.strategies.loss import Loss
from chatlearn_vllm.config.strategies.roles import (
    Role,
    generating_args,
    temperature,
    temperature_keys,
)
from chatlearn_vllm.config.tree import Tree

_OTHER_DIALECT = {
    "models": "a model is a role there",
    "runtime": "its keys are at the top, under ROLL's names",
    "runtime_env": "start the cluster with what the workers need",
    "includes": "files are named in defaults",
}
"""Sections of our own dialect, and what a strategy file has instead."""
_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
ENTRY_SCRIPT = "examples/megatron/entry/train_rlvr.py"


def translate(source: Tree, main_file: Path, problems: list[Problem], notices: list[str]) -> Tree:
    """Our keys, each with the key of the strategy file that it comes from.

    Args:
        source: all keys of the strategy file, without templates.
        main_file: the file.
        problems: takes what is wrong with it.
        notices: takes what its user should know.
    """
    job = _Job(Translation(source, str(main_file), problems), main_file)
    job.translate()
    job.t.break_reported()
    notices += [f"{main_file}: {text}" for text in job.t.notices()]
    return job.t.job


class _Job:
    """One strategy file on its way to a job."""

    def __init__(self, translation: Translation, main_file: Path) -> None:
        self.t = translation
        self.top = Given(translation, (), keys.TOP, _OTHER_DIALECT)
        for name, instead in _OTHER_DIALECT.items():
            if name in self.top.values:
                rule = f"is no key of a file that describes roles; {instead} (docs/strategies.md)"
                translation.report((name,), rule)
        self.main_file = main_file
        self.loss = Loss(translation, self.top)

    def translate(self) -> None:
        """Go through the file: lengths, roles, what lies between them."""
        self.lengths = Lengths(self.t, self.top)
        policy = Role(self.t, ("actor_infer",), "policy", "actor_infer")
        name = "ppo_policy" if self.loss.is_ppo else "policy_trainer"
        trainer = Role(self.t, ("actor_train",), name, "actor_train")
        trainers = [trainer]
        self._policy(policy)
        self._reference()
        rewards = {f"reward_{name}": ("rewards", name) for name in self._reward_names()}
        if "reward_model" in self.top:
            if "reward_model" in rewards:
                rule = "is a second reward of this name; call the one in rewards something else"
                self.t.report(("reward_model",), rule)
            rewards["reward_model"] = ("reward_model",)
        for model, path in rewards.items():
            self._reward(path, model)
        if not rewards:
            self.t.report(("rewards",), "must name at least one: nothing is learned without")
        if self.loss.is_ppo and "critic" in self.top:
            trainers.append(self._critic())
        elif self.loss.is_ppo:
            rule = "gae needs a critic; without one take adv_estimator: grpo or reinforce"
            self.t.report(("adv_estimator",), rule)
        elif "critic" in self.top:
            self.t.has_no_effect(("critic",), "only PPO has one: adv_estimator: gae")
        self._trainers(trainers)
        self.loss.put(trainer)
        self._data(trainer)
        evaluation = Evaluation(self.t, self.top, policy=policy, training=self.sampling)
        evaluation.put(self.lengths, trainer.data_args)
        self._runtime()
        self._words(name)

    # ---- the whole job ----------------------------------------------------------------------

    def _runtime(self) -> None:
        put, top = self.t.put, self.top
        for name, default in (
            ("exp_name", self.main_file.stem),
            ("output_dir", "./output"),
            ("entry_script", ENTRY_SCRIPT),
            ("max_steps", 500),
            ("logging_steps", 1),
            ("ppo_epochs", 1),
        ):
            put(tuple(keys.TOP[name].ours.split(".")), default, (name,))
        if "entry_script" not in top:
            self.t.job.written["runtime", "entry_script"] = ENTRY_SCRIPT
        top.copy()
        put(("runtime", "seed"), self._seed(), ("seed",))
        put(("runtime", "save_episode_interval"), top.get("save_steps", int, 50) or None,
            ("save_steps",))  # fmt: skip
        put(("runtime", "max_ckpt_to_keep"), top.get("max_ckpt_to_keep", int, 0) or None,
            ("max_ckpt_to_keep",))  # fmt: skip
        resume = top.values.get("resume_from_checkpoint")
        if resume not in (None, "") and not isinstance(resume, bool):
            self.t.report(
                ("resume_from_checkpoint",),
                "must be True or False: a job goes on from the newest checkpoint of its own "
                "output_dir and exp_name",
            )
        put(("runtime", "enable_resume_training"), resume is True, ("resume_from_checkpoint",))

    def _seed(self) -> Any:
        return self.top.values.get("seed", 42)

    # ---- roles ------------------------------------------------------------------------------

    def _policy(self, role: Role) -> None:
        role.weights(self._seed(), ("pretrain",))
        if role.strategy == "hf_infer":
            name = ("actor_infer", "strategy_args", "strategy_name")
            role.put("inference_engine", "transformers", name)
        role.generates_with_strategy_config()
        self.sampling = generating_args(self.t, role.path)
        role.samples(self.sampling)
        self.lengths.put_policy(role, self.sampling)
        self._group(role)

    def _group(self, role: Role) -> None:
        """Set the responses of a prompt, and with them the samples of an episode."""
        group = self.top.get("num_return_sequences_in_group", int, least=1)
        own = self.sampling.get("num_return_sequences", int, least=1)
        key = self.sampling.key("num_return_sequences")
        keys_of_group = (("num_return_sequences_in_group",), key)
        if group is not None and own not in (None, group):
            rule = f"must be num_return_sequences_in_group={group}, which says how many are made"
            self.t.report(key, rule)
        self.group = group or own or 1
        role.put("num_inference_per_prompt", self.group, *keys_of_group)
        prompts = self.top.get("rollout_batch_size", int, 128, least=1)
        self.num_samples = prompts * self.group
        self.t.put(("runtime", "sample_per_episode"), self.num_samples, ("rollout_batch_size",))
        self.loss.check(num_samples=self.num_samples, group=self.group, group_keys=keys_of_group)

    def _reference(self) -> None:
        if "reference" not in self.top:
            return
        role = Role(self.t, ("reference",), "reference", "reference")
        self._scores_on_megatron(role, ("pretrain",))
        if self.loss.kl_coef()[0] == 0:
            del self.t.job.values["models"][role.model]
            self.t.has_no_effect(
                ("reference",), "not started without a KL penalty: use_kl_loss with grpo, else "
                "add_token_level_kl"
            )  # fmt: skip

    def _scores_on_megatron(self, role: Role, *weights: Key) -> None:
        self.lengths.put(role)
        role.weights(self._seed(), *weights)
        role.on_megatron()
        role.spread_experts_over_replica()
        role.put("temperature", temperature(self.sampling) or 1.0, *temperature_keys(self.sampling))

    def _reward_names(self) -> list[str]:
        return [*self.top.get("rewards", dict, {})]

    def _reward(self, path: Key, model: str) -> None:
        role = Role(self.t, path, model, "rewards")
        user_args: dict[str, Any] = {}
        self._reward_class(role)
        role.given.get("tag_included", list)
        if (
            role.strategy in ("vllm", "megatron_infer")
            and "device_mapping" not in role.given.values
        ):
            self.t.report(path, f"needs its device_mapping: {role.strategy} runs on devices")
        if (
            role.strategy in ("hf_infer", "megatron_infer")
            and role.given.values.get("worker_cls") is None  # then the class is ours
            and self.t.source.get(role.model_args.key("model_name_or_path")) is None
            and self.t.source.get(("reward_pretrain",)) is None
        ):
            rule = "needs model_args.model_name_or_path, or reward_pretrain: the model that scores"
            self.t.report(path, rule)
        if role.strategy is not None:
            user_args["strategy_name"] = role.strategy
        for name, value in role.given.values.items():
            entry = keys.REWARD.get(name)
            if isinstance(entry, keys.Becomes) and "user_args" in entry.ours and value is not None:
                user_args[name] = value
        tag = self.t.source.get(("actor_train", "data_args", "tag"))
        if tag is not None:
            user_args["tag"] = tag
        if role.strategy == "vllm":
            role.weights(self._seed(), ("reward_pretrain",))
            role.generates_with_strategy_config(load_format="auto")
            self.lengths.put(role)
            sampling = generating_args(self.t, path)
            role.samples(sampling)
            longest = min(512, self.lengths.response)
            longest = sampling.get("max_new_tokens", int, longest, least=1)
            key = sampling.key("max_new_tokens")
            role.put("max_new_tokens", longest, key, ("response_length",), ("sequence_length",))
            n = sampling.get("num_return_sequences", int, 1, least=1)
            role.put("num_inference_per_prompt", n, sampling.key("num_return_sequences"))
            length = role.config.get("max_model_len", int, least=1)
            key = role.config.key("max_model_len")
            if length is not None and length <= longest:
                rule = f"must be more than the {longest} tokens of a response, for the prompt"
                self.t.report(key, rule)
            elif length is not None:
                role.put("seq_length", length, key)
        elif role.strategy == "megatron_infer":
            self._scores_on_megatron(role, ("reward_pretrain",))
        elif role.strategy == "hf_infer":
            role.weights(self._seed(), ("reward_pretrain",))
        elif "model_name_or_path" in role.model_args:
            # A rule needs no weights; ROLL names a model for its tokenizer.
            user_args["model_name_or_path"] = role.model_args.values["model_name_or_path"]
        if user_args:
            role.t.put((*role.at, "model_args", "user_args"), user_args, path)

    def _reward_class(self, role: Role) -> None:
        """Check that a reward says what scores, where the entry script is ours and asks for it."""
        name = role.given.get("worker_cls", str)
        if self._has_own_script():
            return
        remedy = "name a class of yours as package.module.Class (docs/strategies.md, Rewards)"
        if name is not None and not _CLASS.fullmatch(name):
            self.t.report(role.given.key("worker_cls"), f"is no class: {remedy}")
        elif role.given.values.get("worker_cls") is None and role.strategy in (None, "vllm"):
            self.t.report(role.path, f"needs worker_cls, which says how it scores: {remedy}")

    def _has_own_script(self) -> bool:
        """Whether a script of the user's may say what trains on what; it need not be named."""
        return self.top.values.get("entry_script") != ENTRY_SCRIPT

    def _critic(self) -> Role:
        role = Role(self.t, ("critic",), "ppo_value", "critic")
        clip = self.top.get("value_clip", float)
        role.put("cliprange_value", clip, ("value_clip",))
        return role

    # ---- training ---------------------------------------------------------------------------

    def _trainers(self, trainers: list[Role]) -> None:
        actor = trainers[0]
        micro, steps = "per_device_train_batch_size", "gradient_accumulation_steps"
        rows = actor.training_args.get(micro, int, 8, least=1)
        accumulated = actor.training_args.get(steps, int, 1, least=1)
        batch = rows * accumulated * actor.data_parallel_size
        self.t.put(
            ("runtime", "train_micro_batch_size"), rows, actor.training_args.key(micro), actor.path
        )
        self.t.put(
            ("runtime", "train_global_batch_size"), batch,
            actor.training_args.key(steps), actor.training_args.key(micro), actor.path,
        )  # fmt: skip
        for other in trainers[1:]:
            own = other.training_args
            product = own.get(micro, int, rows) * own.get(steps, int, accumulated)
            if product * other.data_parallel_size != batch or own.get(micro, int, rows) != rows:
                self.t.report(
                    own.key(steps if steps in own else micro),
                    f"both trainers take batches of one size: {rows} rows per pass, {batch} per "
                    "optimizer step over all ranks, as actor_train says",
                )
        samples = self.num_samples * self.top.get("ppo_epochs", int, 1, least=1)
        num_steps = self.top.get("max_steps", int, 500) * -(-samples // batch)
        directory = self._checkpoints()
        for role in trainers:
            self.lengths.put(role)
            names = [("pretrain",)] if role is actor else [("reward_pretrain",), ("pretrain",)]
            role.weights(self._seed(), *names)
            role.on_megatron()
            role.trains(num_steps, self.top.get("max_grad_norm", float, 1.0))
            role.put(
                "temperature", temperature(self.sampling) or 1.0, *temperature_keys(self.sampling)
            )
            if directory is not None:
                path = str(Path(directory, role.model))
                role.put("save", path, ("checkpoint_config", "output_dir"))
            if "moe_aux_loss_coef" in role.model_args:
                key = role.model_args.key("moe_aux_loss_coef")
                role.put("moe_aux_loss_coeff", self.t.source.get(key), key)

    def _checkpoints(self) -> str | None:
        given = Given(self.t, ("checkpoint_config",), {}, ("type", "output_dir", "async_upload"))
        if given.get("async_upload", bool, False):
            self.t.put(("runtime", "async_save"), True, given.key("async_upload"))
        if given.values.get("type", "file_system") != "file_system":
            rule = (
                "must be file_system: checkpoints are written to a directory, nothing is uploaded"
            )
            self.t.report(given.key("type"), rule)
        return given.get("output_dir", str)

    # ---- data -------------------------------------------------------------------------------

    def _data(self, trainer: Role) -> None:
        given = trainer.data_args
        self.t.put(("runtime", "data_path"), given.values.get("file_name"), given.key("file_name"))
        if given.values.get("file_name") in (None, "", []) and not self._has_own_script():
            rule = "must name the jsonl file, or a list of them, with the prompts of training"
            self.t.report(given.key("file_name"), rule)
        limit = max_samples(self.t, given)
        if limit is not None:
            self.t.put(("runtime", "training_data_num_limit"), limit, given.key("max_samples"))
        if "prompt" in given:
            target = ("models", "policy", "model_args", "prompt_key")
            self.t.put(target, given.values["prompt"], given.key("prompt"))

    # ---- the user's words -------------------------------------------------------------------

    def _words(self, trainer: str) -> None:
        """Say what our names are called in the file, for the rules that mention them."""
        self.t.job.words.update(
            {
                f"models.{trainer}": "actor_train",
                "models.ppo_value": "critic",
                "models.policy": "actor_infer",
                "models.reference": "reference",
                **{f"models.reward_{name}": f"rewards.{name}" for name in self._reward_names()},
                "models.reward_model": "reward_model",
                "runtime.": "",
                "sample_per_episode": "rollout_batch_size x num_return_sequences_in_group",
                "train_micro_batch_size": "per_device_train_batch_size",
                "train_global_batch_size": "per_device_train_batch_size x "
                "gradient_accumulation_steps x data parallel size",
                "seq_length": "prompt_length + response_length",
                "num_inference_per_prompt x n": "num_return_sequences_in_group",
                "lr_warmup_iters": "warmup_steps",
                "lr_decay_style": "lr_scheduler_type",
                "lr": "learning_rate",
                "save_episode_interval": "save_steps",
                "eval_num_beams": "num_beams of validation.generating_args",
                "inference_engine: vllm": "strategy_name: vllm",
                "inference_engine: transformers": "strategy_name: hf_infer",
                "inference_engine is transformers": "strategy_name is hf_infer",
                # In remedies of the model that generates; on megatron-core they have our names.
                "set tensor_model_parallel_size: 1": "set tensor_parallel_size: 1",
                "set pipeline_model_parallel_size: 1": "set pipeline_parallel_size: 1",
                "a larger tensor_model_parallel_size": "a larger tensor_parallel_size",
            }
        )
