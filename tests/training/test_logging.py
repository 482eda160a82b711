"""The run's figures: nothing is lost, whatever columns come later and however often a run is resumed."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path

import numpy as np
import pytest

from torchrl_vla.training.logging import RunLogger, check_wandb, format_table


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_rows_with_new_columns_keep_the_old_rows(tmp_path: Path):
    logger = RunLogger(tmp_path)
    logger.log({"rollout/success_rate": 0.25}, update=1, env_steps=100)
    logger.log({"rollout/success_rate": 0.5, "val/success_rate": 0.75}, update=2, env_steps=200)
    logger.log({"rollout/success_rate": 0.5}, update=3, env_steps=300)
    rows = read(tmp_path / "metrics.csv")
    assert [row["rollout/success_rate"] for row in rows] == ["0.25", "0.5", "0.5"]
    assert [row["val/success_rate"] for row in rows] == ["", "0.75", ""]
    logger.close()


def test_tensorboard_holds_the_same_figures(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = RunLogger(tmp_path)
    logger.log({"val/success_rate": 0.75}, update=2, env_steps=200)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("val/success_rate")
    assert (event.step, event.value) == (200, 0.75)


def test_resuming_sets_later_rows_aside(tmp_path: Path):
    logger = RunLogger(tmp_path)
    for update in (1, 2, 3):
        logger.log({"x": update}, update=update, env_steps=100 * update)
    logger.close()
    resumed = RunLogger(tmp_path)
    resumed.restore(update=2)
    resumed.log({"x": 30.0}, update=3, env_steps=310)
    resumed.close()
    assert [row["x"] for row in read(tmp_path / "metrics.csv")] == ["1.0", "2.0", "30.0"]
    assert [row["x"] for row in read(tmp_path / "metrics.after-update-2.csv")] == ["1.0", "2.0", "3.0"]


@pytest.mark.parametrize(
    ("cut", "kept"), [(0, 3), (2, 3), (5, 3), (12, 3), (20, 2), (10_000, 0)], ids=lambda value: str(value)
)
def test_a_run_goes_on_with_what_a_cut_file_still_says(tmp_path: Path, cut: int, kept: int):
    logger = RunLogger(tmp_path)
    for update in (1, 2, 3):
        logger.log({"x": 0.123, "y": 5.678}, update=update, env_steps=100 * update)
    logger.close()
    path = tmp_path / "metrics.csv"
    written = path.read_bytes()
    path.write_bytes(written[: max(0, len(written) - cut)])

    resumed = RunLogger(tmp_path)
    resumed.restore(update=3)
    resumed.log({"x": 0.25, "y": 0.5}, update=4, env_steps=400)
    resumed.close()
    rows = read(path)
    assert [float(row["update"]) for row in rows] == [1.0, 2.0, 3.0][:kept] + [4.0]
    # A value that may be the beginning of a longer one is left out.
    assert {row["y"] for row in rows[:-1]} <= {"5.678", ""} and {row["x"] for row in rows[:-1]} <= {"0.123", ""}
    aside = list(tmp_path.glob("metrics.damaged-*.csv"))
    assert [file.read_bytes() for file in aside] == ([written[: max(0, len(written) - cut)]] if cut else [])


def test_the_learning_curve_shows_every_rate_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **named: drawn.append(self) or save(self, *given, **named)
    )
    logger = RunLogger(tmp_path)
    logger.log({"val/success_rate": 0.125}, update=0, env_steps=0)
    logger.log({"rollout/success_rate": 0.25}, update=1, env_steps=100)
    logger.log({"rollout/success_rate": math.nan, "train/grad_norm": 3.0}, update=2, env_steps=200)
    logger.log({"rollout/success_rate": 0.5, "val/success_rate": 0.75}, update=3, env_steps=300)
    logger.draw()
    logger.close()
    assert logger.curve_path.read_bytes().startswith(b"\x89PNG")
    ((axes,),) = (figure.axes for figure in drawn)
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "rollouts (sampled)": [[100, 0.25], [300, 0.5]],
        "validation (greedy)": [[0, 0.125], [300, 0.75]],
    }
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"rollouts (sampled)", "validation (greedy)"}


def test_table_shows_only_what_there_is():
    table = format_table({"rollout/success_rate": 0.5, "rollout/groups_kept": 1, "rollout/groups": 4}, "update 7")
    assert table == "update 7\n  rollout     success 50.0%   groups kept 1   of 4"


@pytest.mark.processes
def test_wandb_writes_to_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = RunLogger(tmp_path, use_wandb=True, config={"episodes": 4321})
    logger.log({"val/success_rate": 0.8125}, update=1, env_steps=1760)
    logger.close()
    (records,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while b"4321" not in records.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)  # a process of wandb's writes it
    for part in (b"val/success_rate", b"0.8125", b"1760", b"episodes", b"4321"):
        assert part in records.read_bytes(), part
    identity = (tmp_path / "wandb_id").read_text()
    assert records.name == f"run-{identity}.wandb"
    RunLogger(tmp_path, use_wandb=True).close()
    assert (tmp_path / "wandb_id").read_text() == identity, "a resumed run is the same one"


def test_videos_are_files_and_go_to_loggers_that_can_encode_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[:, :, :24, 0] = 200
    logger = RunLogger(tmp_path)
    monkeypatch.setattr("torchrl_vla.training.logging._encodes_videos", lambda _: False)
    path = logger.log_video("val/success", frames, env_steps=1760)
    logger.log_video("val/failure", frames, env_steps=1760)
    assert path == tmp_path / "videos" / "val-success-1760.mp4" and path.stat().st_size > 500
    assert capsys.readouterr().out.count("pip install 'moviepy<2' shows them in TensorboardLogger too") == 1
    logged = []
    monkeypatch.setattr("torchrl_vla.training.logging._encodes_videos", lambda _: True)
    monkeypatch.setattr(logger.loggers[0], "log_video", lambda *given, **named: logged.append((*given, named)))
    logger.log_video("val/success", frames, env_steps=3520)
    ((name, video, named),) = logged
    assert (name, named) == ("val/success", {"step": 3520, "fps": 10})
    assert video.shape == (1, 3, 3, 32, 48) and video[0, 1, 0, 5, 3] == 200 and video[0, 1, 2, 5, 3] == 0
    logger.close()


@pytest.mark.processes
def test_wandb_without_a_login_is_refused_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "nobody"))
    with pytest.raises(ValueError, match="wandb login.*WANDB_API_KEY.*WANDB_MODE=offline.*--no-wandb"):
        check_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()
