"""Statistics of releases that were published without them, from the release trained on the same data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from huggingface_hub import hf_hub_download

from torchrl_vla.checkpoints.folder import CheckpointFolder
from torchrl_vla.checkpoints.locations import HUB_ERRORS
from torchrl_vla.checkpoints.statistics import STATISTICS_FILE, read_statistics
from torchrl_vla.config.releases import RELEASES, Release
from torchrl_vla.errors import UserError

__all__ = ["complete_statistics", "release_of"]


def release_of(folder: Path) -> Release | None:
    """Tell which release a folder is of, by its name or by that of the hub's cache.

    Args:
        folder: of a checkpoint.

    Examples:
        >>> release_of(Path("models--moojink--openvla-7b-oft-finetuned-libero-10/snapshots/0a1b")).suite
        'libero_10'
    """
    path = folder.resolve()
    for release in RELEASES:
        cached = f"models--{release.repo.replace('/', '--')}"
        if path.name == release.name or any(parent.name == cached for parent in path.parents):
            return release
    return None


def complete_statistics(checkpoint: CheckpointFolder, key: str) -> CheckpointFolder:
    """Add the statistics of a suite to a release that was fine-tuned on it and lacks them.

    Args:
        checkpoint: the folder, which is left as it is.
        key: name of the suite.

    Returns:
        The same where they are there, or it is no release of that suite.

    Raises:
        ValueError: they are not available.
    """
    release, there = release_of(checkpoint.path), checkpoint.config.statistics
    if release is None or release.suite != key or {key, f"{key}_no_noops"} & set(there):
        return checkpoint
    try:
        file = Path(hf_hub_download(release.statistics, STATISTICS_FILE))
    except HUB_ERRORS as error:
        raise UserError(
            f"{release.repo} was released without the statistics of {key}, so that its actions have no units. "
            f"{STATISTICS_FILE} of {release.statistics} has them, but cannot be downloaded ({type(error).__name__}): "
            f"fetch it where there is a network (`hf download {release.statistics} {STATISTICS_FILE}`) and put it at "
            f"{checkpoint.path / STATISTICS_FILE}."
        ) from error
    statistics = {**there, **read_statistics(file.parent)}
    return replace(checkpoint, config=replace(checkpoint.config, dataset_statistics=statistics))
