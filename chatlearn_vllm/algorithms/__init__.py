"""The mathematics of reinforcement learning: tensors in, tensors out.

Which file has what, and which algorithm uses it:

    advantages.py   group_advantages (GRPO, Dr. GRPO), rloo_advantages, discounted_returns
                    (REINFORCE++)
    gae.py          token_rewards, gae, whiten: PPO; whiten also REINFORCE++
    policy.py       policy_loss: PPO, GRPO, DAPO, GSPO, with dual clip
    value.py        value_loss, explained_variance: PPO
    importance.py   truncated_weights: any policy loss, against the rollout's rounding
    aggregation.py  aggregate: any loss per token
    kl.py           kl_penalty, FixedKL, AdaptiveKL: in the loss or in the reward
    dapo.py         overlong_penalty, informative_groups: DAPO
    preference.py   preference_loss (DPO, IPO), best_and_worst: Online DPO
    mismatch.py     mismatch_metrics: rollout against trainer
    groups.py       rows that answer the same prompt
"""
