"""What is known before a job runs: where ranks go, which models a flow calls; pure Python."""

from chatlearn_vllm.job.placement import PlacementPlan, RankPlacement, place

__all__ = ["PlacementPlan", "RankPlacement", "place"]
