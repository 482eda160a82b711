"""`torchrl-vla demos`: its list options."""

from __future__ import annotations

import pytest

from torchrl_vla.commands.demos import parse_ids


def test_lists():
    assert parse_ids(None, "x") is None
    assert parse_ids("0..3,7", "x") == [0, 1, 2, 3, 7]
    assert parse_ids("9", "x") == [9]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,1", "0-"])
def test_bad_lists_are_named(text: str):
    with pytest.raises(ValueError, match="init_states must"):
        parse_ids(text, "init_states")
