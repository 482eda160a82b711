from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchrl_vla.checkpoints.statistics import action_tokenizer, add_statistics, read_statistics, write_statistics
from torchrl_vla.modules import ActionTokenizer

ENTRY = {
    "action": {"q01": [-0.7, -0.6, -0.9, -0.1, -0.2, -0.1, 0.0], "q99": [0.9] * 7, "mask": [True] * 6 + [False]},
    "proprio": {"q01": [-0.3] * 8, "q99": [0.1] * 8},
}
SHIFTED = {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}


def test_what_is_written_is_read_and_replaced(tmp_path: Path) -> None:
    assert read_statistics(tmp_path) == {}
    write_statistics(tmp_path, {"libero_goal": ENTRY})
    assert read_statistics(tmp_path) == {"libero_goal": ENTRY}
    write_statistics(tmp_path, {"libero_10": SHIFTED})
    assert read_statistics(tmp_path) == {"libero_10": SHIFTED}
    assert [path.name for path in tmp_path.iterdir()] == ["dataset_statistics.json"]


def test_the_exact_key_comes_before_no_noops() -> None:
    both = {"libero_goal": SHIFTED, "libero_goal_no_noops": ENTRY}
    assert action_tokenizer(both, "libero_goal", source=Path("policy")).action_q01[0] == 0
    tokenizer = action_tokenizer({"libero_goal_no_noops": ENTRY}, "libero_goal", source=Path("policy"))
    assert tokenizer.statistics() == ENTRY


def test_statistics_without_the_robots_state_normalise_none() -> None:
    tokenizer = action_tokenizer({"bridge_orig": {"action": ENTRY["action"]}}, "bridge_orig", source=Path("policy"))
    with pytest.raises(ValueError, match="no entry 'proprio'"):
        tokenizer.normalize_proprio(torch.zeros(8))


@pytest.mark.parametrize("trained", ["libero_goal", "libero_10"])
def test_added_statistics_hide_none(trained: str) -> None:
    """Whether the trained ones are among them or not; upstream's entries have more than percentiles."""
    stored = {key: ENTRY | {"num_trajectories": 3} for key in ("libero_goal", "libero_object_no_noops")}
    added = add_statistics(stored, trained, ActionTokenizer(ENTRY))
    assert added == {trained: ENTRY} | stored
    assert add_statistics(stored, "libero_object", ActionTokenizer(ENTRY)) == stored


def test_missing_and_damaged_statistics_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No statistics for 'libero_goal' in policy; it has: libero_spatial"):
        action_tokenizer({"libero_spatial": ENTRY}, "libero_goal", source=Path("policy"))
    with pytest.raises(ValueError, match="policy holds no action statistics"):
        action_tokenizer({}, "libero_goal", source=Path("policy"))
    with pytest.raises(ValueError, match="statistics of 'libero_goal' in policy are damaged: .* got 3"):
        action_tokenizer({"libero_goal": 3}, "libero_goal", source=Path("policy"))
    (tmp_path / "dataset_statistics.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds a JSON list where an object is expected"):
        read_statistics(tmp_path)
