"""OCI registries on loopback: Debian's `docker-registry` where it is installed, and the part of the distribution API
that publishing and pulling use, in 60 lines, where it is not."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BINARY = shutil.which("docker-registry")


class Registry(BaseHTTPRequestHandler):
    """Blobs and manifests in memory: POST and PUT of a blob, HEAD and GET of both, PUT of a manifest."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        kind, name = self.path.split("/")[-2:]
        found = self.server.stored.get((kind, name))
        if found is None:
            self._answer(404, b"{}")
        else:
            data, media = found
            self._answer(200, data, Content_Type=media)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self._body()
        self._answer(202, Location=f"{self.path}one")

    def do_PUT(self) -> None:
        data, media = self._body(), self.headers.get("Content-Type", "")
        if "/uploads/" in self.path:
            name = self.path.partition("digest=")[2].replace("%3A", ":")
            good = name == "sha256:" + hashlib.sha256(data).hexdigest()
            if good:
                self.server.stored["blobs", name] = (data, media)
            self._answer(201 if good else 400, b"" if good else b"digest invalid", Location=self.path)
            return
        self.server.stored["manifests", self.path.split("/")[-1]] = (data, media)
        self._answer(201)


@contextlib.contextmanager
def small() -> Iterator[tuple[str, dict]]:
    """Yield the address of a registry of our own, and what it has stored."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    server.stored = {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", server.stored  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def real(folder: Path) -> Iterator[str]:
    """Yield the address of the reference implementation of a registry."""
    assert BINARY
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n"
    )
    child = subprocess.Popen([BINARY, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=1).close()
                break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        child.kill()
        child.wait()
