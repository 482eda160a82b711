"""Released checkpoints: what they were trained for, and where their statistics are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["OFT_CHECKPOINTS", "RELEASES", "TOKEN_CHECKPOINTS", "Release"]


@dataclass(frozen=True)
class Release:
    """A checkpoint on the hub.

    Args:
        repo: as ``owner/name``.
        suite: that it was fine-tuned on.
        acts_by: ``tokens``, trained for parallel decoding, or ``l1``, regression by an L1 head that reads the robot's
            state and two cameras.
        statistics: repository whose ``dataset_statistics.json`` gives its actions units.
    """

    repo: str
    suite: str
    acts_by: Literal["tokens", "l1"]
    statistics: str

    @property
    def name(self) -> str:
        """Its name without the owner's."""
        return self.repo.partition("/")[2]


_OFT = "moojink/openvla-7b-oft-finetuned-libero-"

RELEASES = (
    Release("Haozhan72/Openvla-oft-SFT-libero-spatial-traj1", "libero_spatial", "tokens", f"{_OFT}spatial"),
    Release("Haozhan72/Openvla-oft-SFT-libero-object-traj1", "libero_object", "tokens", f"{_OFT}object"),
    Release("Haozhan72/Openvla-oft-SFT-libero-goal-traj1", "libero_goal", "tokens", f"{_OFT}goal"),
    Release("Haozhan72/Openvla-oft-SFT-libero10-traj1", "libero_10", "tokens", f"{_OFT}10"),
    Release(f"{_OFT}spatial", "libero_spatial", "l1", f"{_OFT}spatial"),
    Release(f"{_OFT}object", "libero_object", "l1", f"{_OFT}object"),
    Release(f"{_OFT}goal", "libero_goal", "l1", f"{_OFT}goal"),
    Release(f"{_OFT}10", "libero_10", "l1", f"{_OFT}10"),
)
"""Two of each LIBERO suite."""

TOKEN_CHECKPOINTS = tuple(release.repo for release in RELEASES if release.acts_by == "tokens")
"""Those whose action tokens were trained for parallel decoding, one of each LIBERO suite."""

OFT_CHECKPOINTS = f"{_OFT}*"
"""OpenVLA-OFT's own, one of each LIBERO suite: regression by an L1 head, the robot's state and two cameras."""
