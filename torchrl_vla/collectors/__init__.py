"""Collectors of whole episodes; they put environments and policies together."""

from torchrl_vla.collectors.group import GroupCollector, Progress
from torchrl_vla.collectors.plan import Episode, EpisodePlan

__all__ = ["Episode", "EpisodePlan", "GroupCollector", "Progress"]
