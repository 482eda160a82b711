"""Devices by name: what is not supported is refused before anything is loaded."""

from __future__ import annotations

import pytest

from torchrl_vla.training.devices import choose_device


@pytest.mark.parametrize("name", ["mps", "meta", "xpu:0", "", "gpu", "cuda:99"])
def test_other_devices_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' is (unknown|not supported|not on this machine)"):
        choose_device(name)
