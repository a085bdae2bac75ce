"""Models of the hub, from a server of its protocol on loopback: what is read is fetched, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support import folders

COMMIT = "a" * 40
ASK = """
import sys
from llmbuild.errors import InputError
from llmbuild.frontend.source import find_model
from llmbuild.spec.recipe import ModelSource
try:
    found = find_model(ModelSource("huggingface", "someone/model"), 64)
    print(found.digest)
except InputError as error:
    sys.exit(str(error))
"""


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the repository `someone/model`; give its address, and the names that are fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, whole: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/someone/model"):
                names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
                sizes = {name: (folder / name).stat().st_size for name in names}
                tree = [{"type": "file", "path": name, "size": sizes[name], "oid": "0" * 40} for name in names]
                about = {"id": "someone/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self._send(json.dumps(tree if "/tree/" in path else about).encode(), "application/json", whole)
                return
            name = path.removeprefix(f"/someone/model/resolve/{COMMIT}/").removeprefix("/someone/model/resolve/main/")
            if not (folder / name).is_file():
                self.send_error(404)
                return
            if whole:
                fetched.append(name)
            self._send((folder / name).read_bytes(), "application/octet-stream", whole)

        def _send(self, body: bytes, kind: str, whole: bool) -> None:
            self.send_response(200)
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
            for key, value in {**headers, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}.items():
                self.send_header(key, value)
            self.end_headers()
            if whole:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()


def ask(address: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Find the model in a process of its own: the library reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **env}
    return subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, check=False, env={**os.environ, **settings}
    )


def test_what_is_read_is_fetched_and_then_needs_no_network(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "model")
    folders.shard(folder, "shards/a.safetensors", "b.safetensors")
    for name in ("pytorch_model.bin", "optimizer.bin", "other.safetensors", "README.md", "shards/c.safetensors"):
        (folder / name).write_bytes(b"{}")
    with hub(folder) as (address, fetched):
        done = ask(address, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert sorted(fetched) == [
        "b.safetensors", "config.json", "model.safetensors.index.json", "shards/a.safetensors"
    ]  # fmt: skip
    again = ask(address, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_without_the_model_is_one_message(tmp_path: Path, offline: str) -> None:
    with hub(tmp_path / "nothing") as (address, _):
        done = ask(f"{address}/none", tmp_path / "home", HF_HUB_OFFLINE=offline)
    assert done.returncode == 1
    assert done.stderr.startswith("model 'someone/model': neither a folder here nor to be had from the hub")
    assert len(done.stderr.splitlines()) == 1


def test_shards_outside_the_folder_are_never_fetched(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../other/x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with hub(folder) as (address, fetched):
        done = ask(address, tmp_path / "home")
    assert "outside the model's folder" in done.stderr
    assert sorted(fetched) == ["config.json", "model.safetensors.index.json"]
