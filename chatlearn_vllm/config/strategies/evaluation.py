"""How does a strategy file evaluate?"""

from __future__ import annotations

from typing import Any

from chatlearn_vllm.config.strategies import keys
from chatlearn_vllm.config.strategies.given import Given, Translation
from chatlearn_vllm.config.strategies.lengths import Lengths
from chatlearn_vllm.config.strategies.roles import (
    ONLY_WITH_BEAMS,
    Role,
    generating_args,
    temperature,
    temperature_keys,
)
from chatlearn_vllm.config.tree import BROKEN

_DEFAULTS = {"top_p": 0.7, "top_k": 50}
_OWN = (
    *_DEFAULTS, "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
"""Sampling keys that an evaluation may have of its own, besides its temperature."""


class Evaluation:
    """The prompts of `validation`, and what generates for them.

    Args:
        translation: takes our keys, and what is to be said.
        top: the keys at the top of the file.
        policy: actor_infer, which generates here, too.
        training: what actor_infer samples with.
    """

    def __init__(
        self, translation: Translation, top: Given, *, policy: Role, training: Given
    ) -> None:
        self.t = translation
        self.top = top
        self.policy = policy
        self.training = training
        self.given = Given(translation, ("validation",), keys.VALIDATION)
        self.sampling = generating_args(translation, self.given.path)

    def put(self, lengths: Lengths, train_data: Given) -> None:
        """Set the keys of evaluation.

        Args:
            lengths: of training, which an evaluation has, too.
            train_data: the `data_args` of actor_train.
        """
        if "validation" in self.top:
            self._prompts(train_data)
            self._sampling(lengths)
        self._beams()

    def _prompts(self, train_data: Given) -> None:
        data = Given(self.t, self.given.key("data_args"), keys.DATA_ARGS)
        interval = self.top.get("eval_steps", int, 10)
        if "file_name" in data:
            put = self.t.put
            put(("runtime", "eval_data_path"), data.values["file_name"], data.key("file_name"))
            put(("runtime", "eval_episode_interval"), max(0, interval), ("eval_steps",))
            put(("runtime", "enable_eval_before_training"), interval > 0, ("eval_steps",))
            limit = max_samples(self.t, data)
            limit = -1 if limit is None else limit
            put(("runtime", "eval_data_num_limit"), limit, data.key("max_samples"), self.given.path)
        else:
            self.t.has_no_effect(
                self.given.path, "nothing is evaluated without data_args.file_name"
            )
        for name in ("prompt", "tag"):
            if name in data and data.values[name] != train_data.values.get(name, name):
                why = f"data_args.{name} of actor_train counts in an evaluation, too"
                self.t.has_no_effect(data.key(name), why)

    def _sampling(self, lengths: Lengths) -> None:
        sampling = self.sampling
        greedy = self.top.get("val_greedy", bool, False)
        heat = 0.0 if greedy else temperature(sampling)
        self.policy.put("eval_temperature", heat, *temperature_keys(sampling), ("val_greedy",))
        for name in _OWN:
            given = sampling.values.get(name)
            value = _DEFAULTS.get(name) if given is None else given
            if value is not None:
                self.policy.put(f"eval_{name}", value, sampling.key(name))
        same = {"max_new_tokens": lengths.response_of_policy, "num_return_sequences": 1}
        own = (*_OWN, "temperature", "do_sample", "num_beams", "length_penalty")
        for name, value in sampling.values.items():
            if name in own or value in (None, same.get(name, BROKEN)):
                continue
            why = "an evaluation takes one response per prompt, with the lengths of training"
            if name not in same:
                if value == self.training.values.get(name):
                    continue
                why = "an evaluation has what actor_infer says"
            self.t.has_no_effect(sampling.key(name), why)

    def _beams(self) -> None:
        """Set how many beams an evaluation searches, and their length penalty."""
        sampling = self.sampling
        num_beams = sampling.get("num_beams", int, 1, least=1)
        if num_beams > 1:
            self.policy.put("eval_num_beams", num_beams, sampling.key("num_beams"))
        penalties = [one for one in (sampling, self.training) if "length_penalty" in one]
        for one in penalties:
            key = one.key("length_penalty")
            if num_beams == 1:
                self.t.has_no_effect(key, ONLY_WITH_BEAMS)
            elif one is penalties[0]:
                self.policy.put("length_penalty", one.values["length_penalty"], key)
            elif one.values["length_penalty"] != penalties[0].values["length_penalty"]:
                self.t.has_no_effect(key, "that of validation.generating_args counts")


def max_samples(translation: Translation, data_args: Given) -> Any:
    """How many records of a file are used; -1 for all, None where it is not said."""
    limit = data_args.values.get("max_samples")
    if limit == 0:
        rule = "leaves no record; set -1 for all, or leave it out"
        translation.report(data_args.key("max_samples"), rule)
    return limit
