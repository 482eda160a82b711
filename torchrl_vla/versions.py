"""Versions of what a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform

__all__ = ["NOT_A_PACKAGE", "package_version", "versions"]

#: In the place of a version.
NOT_A_PACKAGE = "not installed as a package"

_PACKAGES = ("torchrl-vla", "torch", "torchrl", "tensordict", "transformers", "peft", "mujoco", "robosuite", "numpy")


def package_version(name: str) -> str:
    """Look up the version of an installed package; `NOT_A_PACKAGE` for one that is missing or on PYTHONPATH alone.

    Args:
        name: as pip knows it.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return NOT_A_PACKAGE


def versions() -> dict[str, str]:
    """Look up the versions of what a result depends on, by package, and the machine it ran on."""
    found = {name: package_version(name) for name in _PACKAGES}
    return found | {"python": platform.python_version(), "machine": f"{platform.machine()} {platform.system()}"}
