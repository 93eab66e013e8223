"""Pushing a bundle, against a local stand-in of the Hub's API; the Hub itself was never asked."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PUSH = "import sys; from pathlib import Path; from qsun.hub import push_folder; "
PUSH += "from qsun.errors import QsunError\n"
PUSH += "try: print(push_folder(Path(sys.argv[1]), 'org/name'))\n"
PUSH += "except QsunError as error: sys.exit(f'refused: {error}')"


class Hub(ThreadingHTTPServer):
    """What a Hub is asked when a small folder is pushed; keeps every commit."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path.endswith("/repos/create"):
            self.server.created = json.loads(body)
            self._answer({"url": f"{self.server.url}/org/name"})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/org/name/commit/1"
            self._answer({"success": True, "commitUrl": url, "commitOid": "1"})

    def _answer(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running(status: int = 200) -> Iterator[Hub]:
    with Hub(status) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def push(folder: Path, hub: Hub) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_tested"}
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(folder)],
        env={**os.environ, **settings, "HF_HOME": str(folder.parent / "home")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write_folder(folder: Path) -> Path:
    (folder / "records").mkdir(parents=True)
    (folder / "bundle.json").write_text("{}", encoding="utf-8")
    (folder / "records" / "verdict.json").write_text("[]", encoding="utf-8")
    return folder


def test_every_file_arrives_privately(tmp_path: Path) -> None:
    with running() as hub:
        found = push(write_folder(tmp_path / "bundle"), hub)
    assert found.returncode == 0, found.stderr
    assert hub.files == {"bundle.json": b"{}", "records/verdict.json": b"[]"}
    assert hub.created["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_tested"}


def test_a_refusal_is_told(tmp_path: Path) -> None:
    with running(status=403) as hub:
        found = push(write_folder(tmp_path / "bundle"), hub)
    assert found.returncode == 1
    assert "refused: could not push" in found.stderr
    assert "org/name" in found.stderr
