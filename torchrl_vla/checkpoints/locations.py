"""Where a policy lies: with the package, in a folder, in a run, in the hub's cache, or on the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from torchrl_vla.config.releases import RELEASES, TOKEN_CHECKPOINTS
from torchrl_vla.errors import UserError

__all__ = ["BUNDLED", "CHECKPOINTS", "HUB_ERRORS", "RANDOM", "find_policy", "resolve_checkpoint"]

#: What names of untrained policies begin with.
RANDOM = "random:"
#: The policy for the forty tasks of four suites that comes with the package; the other one knows libero_spatial alone.
#: docs/tiny_policy.md says how both were made.
BUNDLED = "bundled:tiny"
_ASSETS = Path(__file__).parents[1] / "assets"
_BUNDLED_FOLDERS = {BUNDLED: _ASSETS / "tiny_forty", "bundled:tiny-spatial": _ASSETS / "tiny_spatial"}
#: Subfolder of a run with what it can be resumed from.
CHECKPOINTS = "checkpoints"

#: What downloading raises: also an HTTPError of the library below for a network lost on the way, or a RuntimeError of
#: hf_xet.
HUB_ERRORS = (
    HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, RuntimeError,
)  # fmt: skip

_logger = logging.getLogger(__name__)

# The code is never run here: it says which upstream wrote the checkpoint, and goes along with an export.
_HUB_FILES = ["*.json", "*.safetensors", "*_checkpoint.pt", "tokenizer*", "*.model", "*.py"]


def resolve_checkpoint(path_or_hub_id: str | Path, *, local_files_only: bool = False, use_local: bool = True) -> Path:
    """Find the folder of a checkpoint: one on disk, else a Hugging Face repository in the cache or downloaded.

    Args:
        path_or_hub_id: a folder, or a repository as ``owner/name``; a release's is found without its owner too.
        local_files_only: do not use the network.
        use_local: look for a folder of that name first.

    Raises:
        ValueError: there is no such folder and the repository cannot be had.
    """
    path = Path(path_or_hub_id).expanduser()
    if use_local and path.is_dir():
        return path
    advice = (
        "Name a folder that holds config.json and the *.safetensors, or download the repository where there is a "
        "network (`hf download OWNER/NAME --local-dir FOLDER`) and name that folder."
    )
    repo_id = str(path_or_hub_id)
    for release in RELEASES:
        if repo_id == release.name:
            repo_id = release.repo
            _logger.warning(
                "There is no folder %s, so it is taken for the release %s, trained to act by its %s.",
                release.name,
                repo_id,
                "L1 head: its action tokens cannot be trained further" if release.acts_by == "l1" else "tokens",
            )
    if path.is_absolute() or repo_id.startswith((".", "~")) or repo_id.count("/") != 1:
        raise UserError(
            f"there is no checkpoint folder {repo_id!r}. {advice} Checkpoints with trained action tokens, which RL "
            f"needs: {', '.join(TOKEN_CHECKPOINTS)}; bundled:tiny comes with this package."
        )
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES, local_files_only=local_files_only))
    except HUB_ERRORS as error:
        raise UserError(
            f"{repo_id!r} is no folder here, and the Hugging Face repository of that name cannot be had "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). {advice}"
        ) from error


def find_policy(name: str, *, use_local: bool = True) -> Path:
    """Return the folder of a policy that has one: the bundled one, a checkpoint, or the policy of a run's folder.

    Args:
        name: ``bundled:tiny``, ``bundled:tiny-spatial``, a folder or a hub id.
        use_local: look for a folder of that name before asking the hub.

    Raises:
        ValueError: it cannot be had.
    """
    if name.startswith("bundled:") and name not in _BUNDLED_FOLDERS:
        raise UserError(f"{name} does not come with the package: choose {' or '.join(_BUNDLED_FOLDERS)}.")
    folder = _BUNDLED_FOLDERS.get(name) or resolve_checkpoint(name, use_local=use_local)
    if (folder / CHECKPOINTS).is_dir() and (folder / "policy").is_dir():
        return folder / "policy"
    if (folder / CHECKPOINTS).is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} is a run without a policy of its own. One of `train` that was interrupted, or loaded in 4 bits: "
            f"`torchrl-vla export {folder} OUT` writes it from the latest checkpoint. One of `finetune`: go on with it "
            "by --resume."
        )
    return folder
