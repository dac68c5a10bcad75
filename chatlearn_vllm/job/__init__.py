"""From a job description to what runs where; pure Python."""

from chatlearn_vllm.job.placement import PlacementPlan, RankPlacement, place

__all__ = ["PlacementPlan", "RankPlacement", "place"]
