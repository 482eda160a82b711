"""The command itself: what it says of errors, on which terminals, and how it is started."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import torchrl_vla
from torchrl_vla import cli
from torchrl_vla.errors import UserError


def raising(error: BaseException) -> Callable[..., None]:
    def run(*_: object) -> None:
        raise error

    return run


@pytest.mark.processes
def test_it_is_a_module_and_knows_its_version() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "torchrl_vla", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout == f"torchrl-vla {torchrl_vla.__version__}\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("num_envs must be positive, got 0."), "num_envs must be positive, got 0."),
        (OSError(28, "No space left on device", "/data/run"), "/data/run: No space left on device. Choose another"),
        (OSError(28, "No space left on device"), "train: No space left on device. Choose another place"),
        (OSError(30, "Read-only file system", "/mnt/run"), "/mnt/run: Read-only file system. Choose another place"),
        (PermissionError(13, "Permission denied", "/root/run"), "/root/run: Permission denied. Choose another place"),
        (OSError(36, "File name too long", "n" * 300), "n: File name too long. Choose another place"),
        (NotADirectoryError(20, "Not a directory", "a/b"), "a/b: Not a directory. Choose another place"),
    ],
)
def test_what_the_user_can_mend_is_a_sentence(error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", raising(error))
    with pytest.raises(SystemExit, match=rf"^torchrl-vla .*{sentence}"):
        cli.main(["train"])


@pytest.mark.parametrize(
    "error", [ValueError("Only one of a and b"), FileNotFoundError(2, "No such file", "x.py"), OSError(5, "I/O error")]
)
def test_what_comes_from_elsewhere_shows_where_it_does(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", raising(error))
    with pytest.raises(type(error)) as raised:
        cli.main(["train"])
    assert raised.value is error


def test_a_missing_renderer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrl_vla.envs.rendering import RenderingUnavailable

    monkeypatch.setattr(cli, "_run", raising(RenderingUnavailable("install libosmesa6")))
    with pytest.raises(SystemExit, match="torchrl-vla train: install libosmesa6"):
        cli.main(["train"])


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_a_letter_shows_its_number(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(cli, "_run", lambda _: print("the cabinet\u2019s drawer \u2603"))
    cli.main(["evaluate"])
    assert written.getvalue() == rb"the cabinet\u2019s drawer \u2603" + b"\n"


BAD_PLACES = [
    ("/dev/null/run", "Not a directory"),
    ("FILE", "File exists"),
    ("n" * 300, "File name too long"),
    ("/proc/nothing/run", "No such file or directory"),
    ("a\0b", "embedded null byte"),
]


@pytest.mark.parametrize(("place", "reason"), BAD_PLACES)
@pytest.mark.parametrize(
    ("options", "option"),
    [
        (["train", "--preset", "tiny"], "--run-dir"),
        (["finetune", "--dataset", "nothing"], "--run-dir"),
        (["evaluate", "--checkpoint", "bundled:tiny"], "--out"),
        (["demos"], "--out"),
        (["compare", "REPORT", "REPORT"], "--out"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_place_that_cannot_be_written_is_refused_at_once(
    options: list[str], option: str, place: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchrl_vla.commands.demos.prepare_processes", lambda: None)
    monkeypatch.setattr("torchrl_vla.commands.train.prepare_processes", lambda: None)
    monkeypatch.setattr("torchrl_vla.commands.evaluate.prepare_processes", lambda: None)
    (tmp_path / "FILE").write_text("mine")
    episodes = [EpisodeResult(0, 0, True, 8, 1)]
    settings = {"horizon": 220, "fidelity": "exact", "fixture_seed": 0}
    EvaluationReport("libero_spatial", {0: "pick"}, episodes, 1.0, settings).save(tmp_path / "REPORT")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=rf"{option} .* cannot be written \({reason}\): choose another folder"):
        cli.main([*options, option, place])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    from torchrl_vla.files import check_output_file, check_output_folder

    check_output_folder(tmp_path / "a" / "b", "--out")
    check_output_file(tmp_path / "c" / "figures.json", "--json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--json .* is a folder: name a file"):
        check_output_file(tmp_path, "--json")


def test_the_packages_own_sentences_have_their_own_type() -> None:
    """A plain ValueError would be shown as a defect."""
    package = Path(torchrl_vla.__file__).parent
    plain = [
        f"{path.relative_to(package)}:{number}"
        for path in package.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip().startswith("raise ValueError(")
    ]
    assert not plain, "raise torchrl_vla.errors.UserError"
