"""Which rows answer the same prompt, and what do their values have in common?"""

import torch


def index_groups(rewards: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Number the groups from 0, in ascending order of their ids.

    Args:
        rewards: [B].
        groups: [B] int; rows with equal values form a group, in any order.

    Returns:
        The group number of every row, [B] int64 on the device of `rewards`, and how many groups
        there are.

    Raises:
        ValueError: the shapes are not both [B].
    """
    if rewards.dim() != 1 or rewards.shape != groups.shape:
        raise ValueError(
            f"rewards and groups must both be [B], got {list(rewards.shape)} and "
            f"{list(groups.shape)}"
        )
    ids, row_group = groups.to(rewards.device).unique(return_inverse=True)
    return row_group, len(ids)


def group_mean(values: torch.Tensor, row_group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Mean over every row's group.

    Args:
        values: [B] floating.
        row_group: [B], with `num_groups` as `index_groups` returns them.

    Returns:
        [B], the same for all rows of a group.
    """
    sums = values.new_zeros(num_groups).index_add_(0, row_group, values)
    return (sums / row_group.bincount())[row_group]


def group_range(
    values: torch.Tensor, row_group: torch.Tensor, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of every group, each [num_groups].

    Args:
        values: [B].
        row_group: [B], with `num_groups` as `index_groups` returns them.
    """
    empty = values.new_zeros(num_groups)
    return (
        empty.scatter_reduce(0, row_group, values, "amin", include_self=False),
        empty.scatter_reduce(0, row_group, values, "amax", include_self=False),
    )
