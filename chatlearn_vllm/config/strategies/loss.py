"""Which loss does a strategy file ask for?"""

from __future__ import annotations

from collections.abc import Sequence

from chatlearn_vllm.config.problems import Key
from chatlearn_vllm.config.strategies.given import Given, Translation
from chatlearn_vllm.config.strategies.roles import Role
from chatlearn_vllm.config.tree import BROKEN

_LOSS_AGGREGATIONS = {
    "token-mean": "token-mean",
    "seq-mean-token-mean": "seq-mean",
    "seq-mean-token-sum-norm": "seq-mean-token-sum-norm",
}
_KL_IN_USE = {
    "kl_loss_coef": "only with use_kl_loss: True and adv_estimator: grpo",
    "init_kl_coef": "only with add_token_level_kl: True and adv_estimator: reinforce or gae",
}


class Loss:
    """Advantages, KL penalty and policy loss.

    Args:
        translation: takes what is to be said.
        top: the keys at the top of the file.
    """

    def __init__(self, translation: Translation, top: Given) -> None:
        self.t = translation
        self.top = top
        self.estimator = self._estimator()
        """gae, or one of our advantage_estimator."""
        self.is_ppo = self.estimator == "gae"

    def put(self, trainer: Role) -> None:
        """Set the keys of the policy's trainer."""
        top, put = self.top, trainer.put
        self._advantages(trainer)
        coefficient, name, in_use = self.kl_coef()
        put("init_kl_coef", coefficient, name, in_use)
        for other, why in _KL_IN_USE.items():
            if top.values.get(other) and ((other,) != name or not coefficient):
                self.t.has_no_effect((other,), why)
        for name, ours in (
            ("gamma", "gamma"),
            ("lambd", "lam"),
            ("entropy_loss_coef", "entropy_coef"),
        ):
            if name in top:
                put(ours, top.values[name], (name,))
        clip = top.get("pg_clip", float, 0.2)
        if top.get("use_pg_clip_range", bool, False):
            put("cliprange", top.get("pg_clip_low", float, 0.2), ("pg_clip_low",))
            put("cliprange_high", top.get("pg_clip_high", float, 0.2), ("pg_clip_high",))
        else:
            put("cliprange", clip, ("pg_clip",))
            for name in ("pg_clip_low", "pg_clip_high"):
                if name in top:
                    self.t.has_no_effect((name,), "only with use_pg_clip_range: True")
        if top.get("dual_clip_loss", bool, False):
            put("dual_clip", 1 + 2 * clip, ("dual_clip_loss",))
        self._correction(trainer)
        put("loss_agg", self._aggregation(), ("loss_agg_mode",))
        ratio = top.choose("importance_sampling", {"token": "token", "seq": "sequence"}, "token")
        put("ratio_level", ratio, ("importance_sampling",))
        if self.is_ppo and "target_kl" in top:
            put("target", top.values["target_kl"], ("target_kl",))
            put("fix_kl_coef", False, ("target_kl",))
            put("horizon", top.values.get("kl_horizon", 10000), ("kl_horizon",))
        only_ppo = () if self.is_ppo else ("value_clip", "lambd", "target_kl", "kl_horizon")
        for name in only_ppo:
            if name in top:
                self.t.has_no_effect((name,), "only with adv_estimator: gae")

    def kl_coef(self) -> tuple[float, Key, Key]:
        """Weight of the KL penalty, and the keys that say it: the number's, and the switch."""
        top = self.top
        if self.estimator == "grpo":
            in_use, name, default = "use_kl_loss", "kl_loss_coef", 0.0
            other, remedy = "add_token_level_kl", "grpo has its KL in the loss: use_kl_loss: True"
        else:
            in_use, name, default = "add_token_level_kl", "init_kl_coef", 0.2
            other = "use_kl_loss"
            remedy = "reinforce and gae have their KL in the rewards: add_token_level_kl: True"
        if top.get(other, bool, False):
            self.t.report((other,), f"must be False: {remedy} and its coefficient")
        used = top.get(in_use, bool, False)
        return (top.get(name, float, default, least=0) if used else 0.0, (name,), (in_use,))

    def check(self, *, num_samples: int, group: int, group_keys: Sequence[Key]) -> None:
        """Report what the chosen loss has nothing to learn from, or cannot be computed with.

        Args:
            num_samples: responses of an episode.
            group: responses of a prompt.
            group_keys: that say their number.
        """
        asked = self.top.values.get("adv_estimator")
        if self.estimator == "grpo" and group < 2:
            key = next((key for key in group_keys if self.t.source.get(key) is not None), None)
            rule = (
                f"must be 2 or more: adv_estimator {asked} compares the responses of a prompt, and "
                "one has nothing to be compared with; or set adv_estimator: reinforce without "
                "norm_mean_type"
            )
            self.t.report(key or group_keys[0], rule)
        if self.estimator != "grpo" and self.top.values.get("importance_sampling") == "seq":
            rule = (
                "must be token with adv_estimator gae or reinforce, which have an advantage per "
                "token; seq goes with grpo"
            )
            self.t.report(("importance_sampling",), rule)
        coefficient, _, in_use = self.kl_coef()
        if coefficient > 0 and "reference" not in self.top:
            rule = "needs the role reference, whose log-probabilities it compares with; or set"
            self.t.report(in_use, f"{rule} {in_use[0]}: False")
        horizon = self.top.get("kl_horizon", int, 10000)
        if (
            coefficient > 0
            and self.is_ppo
            and "target_kl" in self.top
            and 5 * horizon <= num_samples
        ):
            rule = (
                "must be more than a fifth of rollout_batch_size x num_return_sequences_in_group = "
                f"{num_samples}, or the coefficient could become 0 in one episode"
            )
            self.t.report(("kl_horizon",), rule)

    def _estimator(self) -> str:
        choices = {"gae": "gae", "grpo": "grpo", "reinforce": "reinforce++"}
        # Of one that is refused, what else it would need is not told.
        default = "grpo" if "adv_estimator" in self.top else "gae"
        chosen = self.top.choose("adv_estimator", choices, default)
        if chosen == "reinforce++" and self.top.values.get("norm_mean_type") == "group":
            return "grpo"
        return chosen

    def _advantages(self, trainer: Role) -> None:
        top = self.top
        estimator = self.estimator
        if estimator != "gae":
            trainer.put("advantage_estimator", estimator, ("adv_estimator",))
        mean, std = top.values.get("norm_mean_type"), top.values.get("norm_std_type")
        allowed = (None, "batch", "group")
        for name, value in (("norm_mean_type", mean), ("norm_std_type", std)):
            if value not in allowed:
                self.t.report((name,), "must be group, batch or null: there are no running values")
        if estimator == "grpo":
            by_group = top.values.get("adv_estimator") == "grpo" or std == "group"
            trainer.put("advantage_std", by_group, ("norm_std_type",))
            told = ("whiten_advantages", "reward_clip", "norm_mean_type", "norm_std_type")
            why = "grpo compares a response with its group, and does no more"
        else:
            clip = top.get("reward_clip", float)
            if clip:
                trainer.put("cliprange_reward", clip, ("reward_clip",))
            told = ("norm_mean_type", "norm_std_type")
            why = "whitening over the episode undoes it"
            if std == "group":
                rule = "needs norm_mean_type: group, which makes it grpo; or leave it out"
                self.t.report(("norm_std_type",), rule)
            if top.get("whiten_advantages", bool) is False:
                whitened = "reinforce and gae always whiten advantages"
                self.t.has_no_effect(("whiten_advantages",), whitened)
        for name in told:
            if top.values.get(name) not in (None, False, "group", BROKEN):
                self.t.has_no_effect((name,), why)

    def _aggregation(self) -> str:
        """One of our loss_agg."""
        if self.top.values.get("loss_agg_mode") == "seq-mean-token-sum":
            rule = (
                "is a loss that grows with response_length; set seq-mean-token-sum-norm, which is "
                "this one divided by response_length"
            )
            self.t.report(("loss_agg_mode",), rule)
            return "seq-mean"
        return self.top.choose("loss_agg_mode", _LOSS_AGGREGATIONS, "seq-mean")

    def _correction(self, trainer: Role) -> None:
        """Set the weights that make up for the rollout's other log-probabilities."""
        path = ("train_infer_correction",)
        given = Given(self.t, path, {}, ("is_weight", "filters"))
        if given.values.get("filters"):
            self.t.has_no_effect(given.key("filters"), "samples are weighed, none is left out")
        known = ("enabled", "weight_type", "upper_bound", "detach")
        weight = Given(self.t, given.key("is_weight"), {}, known)
        if not weight.get("enabled", bool, False):
            return
        if weight.values.get("weight_type", "token") != "token":
            rule = "must be token: each token is weighed by its own probabilities"
            self.t.report(weight.key("weight_type"), rule)
        bound = weight.values.get("upper_bound", 1.2)
        if bound is None:
            self.t.report(weight.key("upper_bound"), "must be a number of at least 1")
        else:
            trainer.put("tis_imp_ratio_cap", bound, weight.key("upper_bound"), path)
