"""How does vLLM go on with a response that was begun earlier, with other weights?

Each response is a request of its own, whose prompt is the prompt and what there is of the response;
vLLM computes that part anew with the weights that it has now. The tokens that come are noted, so
that a response can be cut off at any step; their log-probabilities when it is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chatlearn_vllm.data.carried import Begun
from chatlearn_vllm.engines.response_text import Decode, response_texts
from chatlearn_vllm.engines.sampled_logprobs import SampledLogprobs, TokenLogprobs

SEED_STEP = 0x9E3779B97F4A7C15
"""Odd, so that no two lengths below 2**63 give a response the same seed."""


class PartialRequest:
    """A prompt whose responses may have been begun."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        sampling: dict[str, Any],
        begun: list[Begun],
    ) -> None:
        """Keep what is there.

        Args:
            request_id: of all responses together.
            prompt: its text.
            prompt_token_ids: what the model sees of it.
            sampling: for `vllm.SamplingParams`, with `max_tokens` and `seed` of whole responses.
            begun: the responses so far, `n` of them; goes on being written to.
        """
        self.request_id = request_id
        self.begun = begun
        self._prompt = prompt
        self._prompt_token_ids = list(prompt_token_ids)
        self._sampling = sampling

    @property
    def takes_sampled_logprobs(self) -> bool:
        """Whether log-probabilities of no other tokens are asked for."""
        return self._sampling.get("logprobs") == 0

    @property
    def is_finished(self) -> bool:
        """Whether all responses are."""
        return all(begun.finish_reason is not None for begun in self.begun)

    @property
    def open_ids(self) -> list[str]:
        """vLLM's requests for the responses that are not finished."""
        return [
            self._id_of(index)
            for index, begun in enumerate(self.begun)
            if begun.finish_reason is None
        ]

    def requests(self) -> Iterator[tuple[str, list[int], dict[str, Any]]]:
        """Ids, prompts and sampling keys of the requests to vLLM."""
        for index, begun in enumerate(self.begun):
            room = self._sampling["max_tokens"] - len(begun.token_ids)
            if begun.finish_reason is None and room <= 0:
                begun.finish_reason = "length"
            if begun.finish_reason is not None:
                continue
            # Not the numbers again that the first tokens were drawn with.
            seed = (self._sampling["seed"] + index + SEED_STEP * len(begun.token_ids)) % 2**63
            keys = {"n": 1, "max_tokens": room, "seed": seed}
            yield (
                self._id_of(index),
                self._prompt_token_ids + begun.token_ids,
                self._sampling | keys,
            )

    def note(self, output: Any, version: int) -> None:
        """Add the new tokens of one response.

        Args:
            output: `vllm.RequestOutput` of kind DELTA.
            version: of the weights that sampled them.
        """
        begun = self.begun[int(output.request_id.rpartition("#")[2])]
        (new,) = output.outputs
        begun.token_ids += new.token_ids
        if new.logprobs:
            begun.logprobs += [
                entry[token].logprob
                for entry, token in zip(new.logprobs, new.token_ids, strict=True)
            ]
        begun.versions += [version] * len(new.token_ids)
        begun.finish_reason, begun.stop_reason = new.finish_reason, new.stop_reason

    def fill_logprobs(self, sampled: SampledLogprobs) -> None:
        """Look up what did not come with the tokens, once no response goes on.

        Raises:
            RuntimeError: a token's never came.
        """
        for index, begun in enumerate(self.begun):
            if new := begun.token_ids[len(begun.logprobs) :]:
                begun.logprobs += sampled.take(self._id_of(index), new)

    @property
    def skip_special_tokens(self) -> bool:
        """Whether texts are made without special tokens."""
        return self._sampling.get("skip_special_tokens", True)

    def output(self, decode: Decode) -> Any:
        """The finished responses as one `vllm.RequestOutput`; their texts are what vLLM makes."""
        from vllm import RequestOutput

        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=None,
            outputs=[self._completion(index, decode) for index in range(len(self.begun))],
            finished=True,
        )

    def _completion(self, index: int, decode: Decode) -> Any:
        from vllm import CompletionOutput

        begun = self.begun[index]
        return CompletionOutput(
            index=index,
            text=self._text(begun, decode),
            token_ids=begun.token_ids,
            cumulative_logprob=sum(begun.logprobs),
            logprobs=TokenLogprobs.of(begun.token_ids, begun.logprobs),
            finish_reason=begun.finish_reason,
            stop_reason=begun.stop_reason,
        )

    def _text(self, begun: Begun, decode: Decode) -> str:
        """What a response says, without what ended it unless that is asked for."""
        ids, stop = begun.token_ids, begun.stop_reason
        keeps_end = self._sampling.get("include_stop_str_in_output", False)
        if not isinstance(stop, str):
            if begun.finish_reason == "stop" and not keeps_end:
                ids = ids[:-1]
            (text,) = response_texts(decode, self._prompt_token_ids, [ids])
            return text
        text, before = response_texts(decode, self._prompt_token_ids, [ids, ids[:-1]])
        # The last token made it whole, or one of those that were accepted with the last one.
        end = text.find(stop, max(0, len(before) - len(stop) + 1))
        end = text.rfind(stop) if end < 0 else end
        if end < 0:
            return text
        return text[: end + len(stop)] if keeps_end else text[:end]

    def _id_of(self, index: int) -> str:
        return f"{self.request_id}#{index}"
