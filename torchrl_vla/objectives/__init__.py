"""Losses and advantages; they know tensordict keys, and neither environments nor policies."""

from torchrl_vla.objectives.clip_ppo import AsymmetricClipPPOLoss
from torchrl_vla.objectives.estimate_advantage import EstimateAdvantage
from torchrl_vla.objectives.grpo import GRPOAdvantage

__all__ = ["AsymmetricClipPPOLoss", "EstimateAdvantage", "GRPOAdvantage"]
