"""How long may prompts, responses and whole sequences of a strategy file be?"""

from __future__ import annotations

from chatlearn_vllm.config.strategies.given import Given, Translation
from chatlearn_vllm.config.strategies.roles import Role

_DEFAULT_PROMPT = 1024
_AFTER_AN_ERROR = 512
"""Tokens of a response where the file names no usable length."""


class Lengths:
    """Tokens of prompts, responses and both together.

    Args:
        translation: takes what is to be said.
        top: the keys at the top of the file.
    """

    def __init__(self, translation: Translation, top: Given) -> None:
        self.t = translation
        self._top = top
        prompt = top.get("prompt_length", int, least=1)
        response = top.get("response_length", int, least=1)
        total = top.get("sequence_length", int, least=1)
        if "response_length" not in top and "sequence_length" not in top:
            rule = "must be given, or sequence_length: how long a response may be"
            translation.report(("response_length",), rule)
        if prompt is None and response and total and total > response:
            prompt = total - response
        self.prompt = prompt or _DEFAULT_PROMPT
        if response is None and total and total > self.prompt:
            response = total - self.prompt
        self.response = response or _AFTER_AN_ERROR
        if total is not None and total != self.sequence:
            translation.report(("sequence_length",), self._rule_of_sequence_length(total))
        self.response_of_policy = self.response
        """Tokens that actor_infer is asked for at most."""

    @property
    def sequence(self) -> int:
        """A prompt and its response."""
        return self.prompt + self.response

    def _rule_of_sequence_length(self, total: int) -> str:
        """What a sequence_length breaks that is not the sum of the others."""
        if "response_length" in self._top and "prompt_length" in self._top:
            return (
                f"must be prompt_length + response_length = {self.prompt} + {self.response} = "
                f"{self.sequence}; leave it out"
            )
        if "response_length" in self._top:
            return f"must be more than response_length={self.response}: a prompt needs room, too"
        known = f"prompt_length={self.prompt}"
        if "prompt_length" not in self._top:
            known = f"prompt_length, which is {self.prompt} where the file does not say it"
        return f"must be more than {known}: a response needs room behind the prompt"

    def put(self, role: Role) -> None:
        """Set the lengths of a role that has those of the job."""
        role.put("max_new_tokens", self.response, ("response_length",), ("sequence_length",))
        role.put(
            "seq_length", self.sequence,
            ("sequence_length",), ("response_length",), ("prompt_length",),
        )  # fmt: skip

    def put_policy(self, role: Role, sampling: Given) -> None:
        """Set the lengths of actor_infer: prompts keep theirs, whatever responses have."""
        self.put(role)
        key = sampling.key("max_new_tokens")
        response = sampling.get("max_new_tokens", int, self.response, least=1)
        if response > self.response:
            longest, source = f"response_length={self.response}", "response_length"
            if "response_length" not in self._top:
                longest, source = f"sequence_length - prompt_length = {self.response}", "that"
            rule = f"must be at most {longest}, the longest response of the job; raise {source}"
            self.t.report(key, rule)
            response = self.response
        if response < self.response:
            role.put("max_new_tokens", response, key)
            role.put("seq_length", self.prompt + response, key)
        self.response_of_policy = response
        self._max_model_len(role)

    def _max_model_len(self, role: Role) -> None:
        """Set vLLM's longest sequence; where it is shorter than the job's, responses end there."""
        length = role.config.get("max_model_len", int, least=1)
        key = role.config.key("max_model_len")
        if length is None:
            return
        response = self.response_of_policy
        if length >= self.prompt + response:
            role.put("max_model_len", length, key)
            return
        if length <= self.prompt:
            rule = f"must be more than prompt_length={self.prompt}: a response needs room behind it"
            self.t.report(key, rule)
            return
        role.put("seq_length", length, key)
        role.put("max_new_tokens", length - self.prompt, key)
        role.put("new_token_limit", response < length, key)
        name = "response_length" if response == self.response else "max_new_tokens"
        self.t.say(
            f"{'.'.join(key)}={length} is less than prompt_length + {name} = "
            f"{self.prompt + response}: responses have at most {length - self.prompt} tokens"
            + (", more behind a short prompt" if response >= length else "")
        )
