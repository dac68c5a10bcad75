"""A reward for some records only: those whose tag is one of a list."""

from typing import Any

import torch

from chatlearn_vllm import BaseModule
from chatlearn_vllm.data.batch import batch_size, select


def for_tags(reward: type[BaseModule]) -> type[BaseModule]:
    """A class that scores as `reward` does, and gives 0 to records of other tags.

    The tags are `user_args["tag_included"]`, the record's field `user_args["tag"]` (default "tag").
    """

    class TaggedReward(reward):
        def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
            """`rewards` [B]."""
            args = self.model_args.user_args
            tags = data[args.get("tag", "tag")]
            rows = [row for row, tag in enumerate(tags) if tag in args["tag_included"]]
            rewards = torch.zeros(batch_size(data))
            if rows:
                scores = super().forward_step(select(data, rows), iteration)
                rewards[rows] = torch.as_tensor(scores["rewards"]).float()
            return {"rewards": rewards}

    TaggedReward.__name__ = f"Tagged{reward.__name__}"
    return TaggedReward
