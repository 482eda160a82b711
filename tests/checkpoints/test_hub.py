"""Downloading from the hub, against a small server of our own that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from torchrl_vla.checkpoints.locations import resolve_checkpoint
from torchrl_vla.checkpoints.openvla_format import load_openvla

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = "model-00001-of-00003.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves one folder as ``owner/tiny``; breaks off in the middle of a file, once."""

    daemon_threads = True
    block_on_close = False  # the client keeps its connections

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
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
        if path.startswith("/api/models/owner/tiny"):
            names = [file.name for file in self.server.folder.iterdir()]
            info = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            entries = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in names]
            self.reply(json.dumps(entries if "/tree/" in path else info).encode(), body, {})
            return
        match = re.fullmatch(r"/owner/tiny/resolve/[^/]+/(.+)", path)
        file = self.server.folder / match[1] if match else None
        if file is None or not file.is_file():
            self.send_error(404)
            return
        self.server.asked.add(file.name)
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            self.server.ranges.append(asked)
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        breaks = body and file.name == LARGE and not asked and self.server.breaks > 0
        self.reply(content[start:], body, headers, status=206 if asked else 200, breaks=breaks)

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
    server = Hub(checkpoint)
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
