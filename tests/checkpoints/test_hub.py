"""Downloading from the hub, against a small server of our own that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import torchrl_vla
from torchrl_vla.checkpoints.locations import resolve_checkpoint
from torchrl_vla.checkpoints.openvla_format import load_openvla
from torchrl_vla.checkpoints.policy import policy_mode, save_policy
from torchrl_vla.cli import main
from torchrl_vla.config import OpenVLAActorConfig
from torchrl_vla.config.releases import RELEASES, Release

SUITE_NAMES = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = "model-00001-of-00003.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories; breaks off in the middle of a file of ``owner/tiny``, once."""

    daemon_threads = True
    block_on_close = False  # the client keeps its connections

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders = folders
        self.breaks = 1
        self.ranges: list[str] = []
        self.asked: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path)
        if asked and asked[1] in self.server.folders:
            names = [file.name for file in self.server.folders[asked[1]].iterdir()]
            info = {"id": asked[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            entries = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in names]
            self.reply(json.dumps(entries if "/tree/" in path else info).encode(), body, {})
            return
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        folder = self.server.folders.get(match[1]) if match else None
        file = folder / match[2] if match and folder else None
        if file is None or not file.is_file():
            self.send_error(404)
            return
        self.server.asked.add(file.name)
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = 0
        if part := self.headers.get("Range"):
            start = int(part.removeprefix("bytes=").partition("-")[0])
            self.server.ranges.append(part)
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        breaks = body and file.name == LARGE and not part and self.server.breaks > 0
        self.reply(content[start:], body, headers, status=206 if part else 200, breaks=breaks)

    def reply(
        self, content: bytes, body: bool, headers: dict[str, str], *, status: int = 200, breaks: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if breaks else content)
        if breaks:
            self.server.breaks -= 1
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub({"owner/tiny": checkpoint})
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # whole chunks are kept
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_that_broke_off_goes_on_and_shows_it(
    hub: Hub, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = resolve_checkpoint("owner/tiny")
    assert hub.breaks == 0 and len(hub.ranges) == 1 and not hub.ranges[0].startswith("bytes=0-")
    assert "%|" in capsys.readouterr().err  # a progress bar
    for file in checkpoint.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert load_openvla("owner/tiny").action_head is not None


def test_a_local_folder_spares_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    assert resolve_checkpoint("owner/tiny") == Path("owner/tiny") and not hub.asked
    assert (resolve_checkpoint("owner/tiny", use_local=False) / "config.json").is_file() and hub.asked


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(ValueError, match="'owner/other' is no folder here, .*cannot be had.*404"):
        resolve_checkpoint("owner/other")


@pytest.fixture(scope="module")
def releases(copy_release: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the eight LIBERO releases, laid out as the hub has them, each suite with statistics of its own."""
    folders = {}
    for release in RELEASES:
        folder = copy_release(tmp_path_factory.mktemp("hub") / release.name)
        path = folder / "dataset_statistics.json"
        entry = json.loads(path.read_text())["libero_spatial_no_noops"]
        if release.acts_by == "tokens":
            for file in (path, *folder.glob("*.pt")):
                file.unlink()
        else:
            entry["action"]["q01"][0] = -1.0 - SUITE_NAMES.index(release.suite)
            path.write_text(json.dumps({f"{release.suite}_no_noops": entry}))
        folders[release.repo] = folder
    return folders


@pytest.fixture
def releases_hub(hub: Hub, releases: dict[str, Path]) -> Hub:
    hub.folders = releases
    hub.breaks = 0
    return hub


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.repo)
def test_releases_act_by_the_statistics_of_their_suite(release: Release, releases_hub: Hub, tmp_path: Path) -> None:
    by_head = release.acts_by == "l1"
    options = {"load_l1_action_head": True, "use_tokenized_actions": False} if by_head else {}
    policy = torchrl_vla.load_policy(release.repo, task_suite=release.suite, trainable=False, **options)
    expected = -1.0 - SUITE_NAMES.index(release.suite)
    assert policy.processor.action_tokenizer.action_q01[0] == expected
    assert policy_mode(release.repo).name == release.acts_by
    # What is saved has them, so that it goes on without the hub.
    save_policy(policy, tmp_path / "saved")
    again = torchrl_vla.load_policy(tmp_path / "saved", task_suite=release.suite, trainable=False, **options)
    assert again.processor.action_tokenizer.action_q01[0] == expected


def test_a_token_release_trains_as_it_comes(releases_hub: Hub) -> None:
    policy = torchrl_vla.load_policy(RELEASES[0].repo, task_suite="libero_spatial", lora_rank=2)
    assert any(parameter.requires_grad for parameter in policy.model.parameters())
    with pytest.raises(ValueError, match="No statistics for 'libero_goal'.*bridge_orig"):
        torchrl_vla.load_policy(RELEASES[0].repo, task_suite="libero_goal", lora_rank=2)


def test_the_guides_name_without_owner_is_a_release(
    releases_hub: Hub, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    name = OpenVLAActorConfig().pretrained_checkpoint
    policy = torchrl_vla.load_policy(
        name, task_suite="libero_spatial", trainable=False, load_l1_action_head=True, use_tokenized_actions=False
    )
    assert policy.model.action_head is not None
    assert f"taken for the release moojink/{name}, trained to act by its L1 head" in caplog.text
    (tmp_path / name).mkdir()
    assert resolve_checkpoint(name) == Path(name)


@pytest.mark.processes
def test_statistics_that_cannot_be_downloaded_say_which_file_goes_where(
    releases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    release = RELEASES[0]
    folder = Path(shutil.copytree(releases[release.repo], tmp_path / release.name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    where = folder / "dataset_statistics.json"
    message = f"hf download {release.statistics} dataset_statistics.json`. and put it at {where}"
    with pytest.raises(ValueError, match=f"released without the statistics of libero_spatial.*{message}"):
        torchrl_vla.load_policy(folder, task_suite="libero_spatial")
    with pytest.raises(SystemExit) as end:
        main(["doctor", str(folder), "--device", "cpu"])
    assert end.value.code == 1 and f"problem  statistics: {release.repo} was released" in capsys.readouterr().out
    shutil.copyfile(releases[release.statistics] / where.name, where)
    assert torchrl_vla.load_policy(folder, task_suite="libero_spatial", lora_rank=2).statistics_key == "libero_spatial"
