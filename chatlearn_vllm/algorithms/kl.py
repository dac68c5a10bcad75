"""How far has a policy moved from its reference? Estimated at the sampled tokens only."""

import torch

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_penalty(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
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

    Returns:
        [...] in nats, differentiable in `logprobs`.

    Raises:
        ValueError: another kind.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimator={kind!r} must be one of {', '.join(KL_ESTIMATORS)}")
