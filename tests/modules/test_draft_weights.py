"""Does a draft have its own weights again after a sleep that lost them?"""

import torch
from torch import nn

from chatlearn_vllm.engines.draft_weights import DraftWeights


class Draft(nn.Module):
    """Shares a target's embedding and position numbers, and has a layer and a buffer of its own."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.embedding = target.embedding
        self.layer = nn.Linear(3, 2)
        self.register_buffer("positions", target.positions)
        self.register_buffer("ids", torch.tensor([5, 6, 7]))


class Target(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.register_buffer("positions", torch.tensor([1.0, 2.0]))


def lose(*models: nn.Module) -> None:
    """What sleep level 2 does."""
    with torch.no_grad():
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()


def test_what_is_the_drafts_own_comes_back_and_what_it_shares_is_left_to_the_sync() -> None:
    target = Target()
    draft = Draft(target)
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    kept = DraftWeights(draft, target)
    assert kept.num_bytes == 0
    kept.keep()
    assert kept.num_bytes == 4 * (6 + 2) + 8 * 3
    for _ in range(2):
        lose(target, draft)
        kept.give_back()
        for name in ("layer.weight", "layer.bias", "ids"):
            assert torch.equal(draft.state_dict()[name], before[name]), name
        assert not draft.embedding.weight.any() and not draft.positions.any()


def test_a_copy_that_is_there_is_not_made_again() -> None:
    target = Target()
    draft = Draft(target)
    weight = draft.layer.weight.detach().clone()
    kept = DraftWeights(draft, target)
    kept.keep()
    lose(draft)
    kept.keep()  # of what was lost
    kept.give_back()
    assert torch.equal(draft.layer.weight, weight)


def test_weights_whose_place_others_have_taken_do_not_come_back() -> None:
    target = Target()
    draft = Draft(target)
    kept = DraftWeights(draft, target)
    kept.keep()
    lose(draft)
    kept.forget()
    assert kept.num_bytes == 0
    kept.give_back()
    assert not draft.layer.weight.any()
    with torch.no_grad():
        draft.layer.weight.fill_(3)
    kept.keep()
    lose(draft)
    kept.give_back()
    assert (draft.layer.weight == 3).all()


def test_of_a_draft_that_is_synced_again_the_buffers_alone_are_kept() -> None:
    target = Target()
    draft = Draft(target)
    ids = draft.ids.clone()
    kept = DraftWeights(draft, target)
    kept.keep(buffers_only=True)
    assert kept.num_bytes == 8 * 3
    lose(draft)
    kept.give_back()
    assert torch.equal(draft.ids, ids) and not draft.layer.weight.any()
