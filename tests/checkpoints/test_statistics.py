from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchrl_vla.checkpoints.statistics import action_tokenizer, add_statistics, read_statistics, write_statistics
from torchrl_vla.modules import ActionTokenizer, OpenVLAConfig

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


def tokenizer(statistics: dict, key: str, **fields: object) -> ActionTokenizer:
    return action_tokenizer(OpenVLAConfig.seven_b(norm_stats=statistics, **fields), key, source=Path("policy"))


def test_the_exact_key_comes_before_no_noops() -> None:
    both = {"libero_goal": SHIFTED, "libero_goal_no_noops": ENTRY}
    assert tokenizer(both, "libero_goal").action_q01[0] == 0
    assert tokenizer({"libero_goal_no_noops": ENTRY}, "libero_goal").statistics() == ENTRY


def test_statistics_without_the_robots_state_normalise_none() -> None:
    deaf = tokenizer({"bridge_orig": {"action": ENTRY["action"]}}, "bridge_orig")
    with pytest.raises(ValueError, match="no entry 'proprio'"):
        deaf.normalize_proprio(torch.zeros(8))


@pytest.mark.parametrize("trained", ["libero_goal", "libero_10"])
def test_added_statistics_hide_none(trained: str) -> None:
    """Whether the trained ones are among them or not; upstream's entries have more than percentiles."""
    stored = {key: ENTRY | {"num_trajectories": 3} for key in ("libero_goal", "libero_object_no_noops")}
    added = add_statistics(stored, trained, ActionTokenizer(ENTRY))
    assert added == {trained: ENTRY} | stored
    assert add_statistics(stored, "libero_object", ActionTokenizer(ENTRY)) == stored


def test_missing_and_damaged_statistics_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No statistics for 'libero_goal' in policy; it has: libero_spatial"):
        tokenizer({"libero_spatial": ENTRY}, "libero_goal")
    with pytest.raises(ValueError, match="policy holds no action statistics"):
        tokenizer({}, "libero_goal")
    (tmp_path / "dataset_statistics.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds a JSON list where an object is expected"):
        read_statistics(tmp_path)


def changed(part: str, **fields: object) -> dict:
    return {**ENTRY, part: {**ENTRY[part], **fields}}


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "'action', got 3"),
        ([1, 2], r"'action', got \[1, 2\]"),
        (changed("action", q01=[1.0] * 7), "dimension 0 are 1.0 and 0.9; both must be finite, and 'q01' not above"),
        (changed("action", q99=[0.9] * 6 + [INFINITY]), "dimension 6 are 0.0 and inf"),
        (changed("action", q01=[NAN] + [0.0] * 6), "dimension 0 are nan and 0.9"),
        (changed("action", q01=[None] * 7), "must be lists of numbers"),
        (changed("action", mask=["true"] * 7), "'mask'. must be a list of true and false, got .'true'"),
        (changed("action", mask="all"), "'mask'. must be a list of true and false, got 'all'"),
        (changed("action", q01=[-1] * 14, q99=[1] * 14, mask=[True] * 14), "of 14 actions, the policy has 7"),
        (changed("proprio", q01=[-1] * 14, q99=[1] * 14), "states of 14 numbers, the policy reads 8"),
        (changed("proprio", q99=[-INFINITY] * 8), "statistics.'proprio'.* are -0.3 and -inf"),
        ({"action": ENTRY["action"]}, "the policy reads the robot's state, but they have no 'proprio'"),
    ],
    ids=str,
)
def test_statistics_that_give_no_units_are_refused(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"statistics of 'libero_goal' in policy cannot be used: .*{message}"):
        tokenizer({"libero_goal": entry}, "libero_goal", use_proprio=True)


def test_what_released_statistics_have_is_taken() -> None:
    """A dimension that never moves, and zeros and ones for a mask."""
    entry = changed("action", q01=[0.0] * 7, q99=[0.0] * 7, mask=[1] * 6 + [0])
    assert tokenizer({"libero_goal": entry}, "libero_goal").action_mask.tolist() == [True] * 6 + [False]
    # A policy that does not read the state may have any.
    assert tokenizer({"libero_goal": changed("proprio", q01=[-1] * 14, q99=[1] * 14)}, "libero_goal")
