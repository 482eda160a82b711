"""Names of released checkpoints."""

from __future__ import annotations

__all__ = ["OFT_CHECKPOINTS", "TOKEN_CHECKPOINTS"]

TOKEN_CHECKPOINTS = (
    "Haozhan72/Openvla-oft-SFT-libero-spatial-traj1",
    "Haozhan72/Openvla-oft-SFT-libero-object-traj1",
    "Haozhan72/Openvla-oft-SFT-libero-goal-traj1",
    "Haozhan72/Openvla-oft-SFT-libero10-traj1",
)
"""Those whose action tokens were trained for parallel decoding, one of each LIBERO suite."""

OFT_CHECKPOINTS = "moojink/openvla-7b-oft-finetuned-libero-*"
"""OpenVLA-OFT's own, one of each LIBERO suite: regression by an L1 head, the robot's state and two cameras."""
