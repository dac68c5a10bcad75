"""How far has a policy moved from its reference, and how much should that cost?

The distance is estimated at the sampled tokens only. Its price, the coefficient of the KL penalty,
is fixed or follows a target.
"""

import math

import torch

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_penalty(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    kind: str,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Estimate KL(policy || reference) at every sampled token.

    With d = log p_policy - log p_reference at a token sampled from the policy (J. Schulman,
    "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html):

        k1 = d                    no bias, may be negative; as a loss its expected gradient is 0,
                                  so use it in rewards or as a metric only
        k2 = d^2 / 2              biased, never negative; its gradient is that of the KL
        k3 = exp(-d) - 1 + d      no bias, never negative; the one of GRPO (Shao et al. 2024,
                                  DeepSeekMath, arXiv:2402.03300, equation 4)

    Args:
        logprobs: [...] under the policy, at the tokens that the policy sampled.
        ref_logprobs: [...] under the reference.
        kind: "k1", "k2" or "k3".
        mask: [...], nonzero on tokens that count; elsewhere the inputs may hold anything and the
            estimate is 0. None means that all tokens count.

    Returns:
        [...] in nats, differentiable in `logprobs`.

    Raises:
        ValueError: another kind.
    """
    difference = logprobs - ref_logprobs
    if mask is not None:
        # Masked before exp: an overflow outside the mask would turn the gradient into NaN.
        difference = torch.where(mask != 0, difference, 0.0)
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimator={kind!r} must be one of {', '.join(KL_ESTIMATORS)}")


class FixedKL:
    """A coefficient that stays what it is."""

    coef: float
    """Weight of the KL penalty, in units of the reward per nat."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, num_samples: int) -> None:
        """Do nothing: the counterpart of `AdaptiveKL.update`."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs to hold, so that an `AdaptiveKL` could go on from here."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Do nothing: the coefficient is the one of today's configuration."""


class AdaptiveKL:
    """A coefficient that rises while the KL is above its target and falls while it is below.

    D. Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593,
    section 2.2, a proportional controller in log space:

        e    = clamp(kl / target - 1, -0.2, 0.2)
        coef = coef * (1 + e * num_samples / horizon)

    where num_samples / horizon is the paper's K.

    Example:
        controller = AdaptiveKL(0.02, target=6.0, horizon=10000)
        rewards = token_rewards(scores, kl, mask, kl_coef=controller.coef)
        controller.update(mean_kl, num_samples)  # once per episode, with the KL of its samples
    """

    coef: float
    """Weight of the KL penalty now, in units of the reward per nat."""

    def __init__(self, coef: float, *, target: float, horizon: float) -> None:
        """Start at a coefficient.

        Args:
            coef: above 0, for it is changed by factors.
            target: KL to hold, in nats and above 0; per response, as a sum over its tokens, if
                that is what `update` is given.
            horizon: number of samples over which an error of e would change the coefficient by
                the share e, if it did so in one step.

        Raises:
            ValueError: one of them is not above 0.
        """
        settings = {"init_kl_coef": coef, "target": target, "horizon": horizon}
        problems = [f"{key}={value}" for key, value in settings.items() if not value > 0]
        if problems:
            raise ValueError(f"an adaptive KL needs values above 0, got {', '.join(problems)}")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Adjust the coefficient after an episode.

        Args:
            kl: mean over the episode's samples, in the unit of the target.
            num_samples: how many samples the episode had, less than five horizons.

        Raises:
            ValueError: `kl` is NaN or infinite, or the coefficient could become 0 or negative.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL is {kl}; a coefficient cannot follow it")
        if 0.2 * num_samples >= self.horizon:
            raise ValueError(
                f"horizon={self.horizon} must be larger than a fifth of the {num_samples} samples "
                "of an episode"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs to hold."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from the coefficient of a checkpoint; target and horizon are today's."""
        self.coef = state["coef"]
