"""An ssh server of one's own on loopback: own port, keys and configuration in a folder that goes with it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
SEPARATION = Path("/run/sshd")
KERNEL = "0.1.2-far"
FAR = f"""
import platform, sys
platform.release = lambda: {KERNEL!r}
at = sys.argv.index("-c")
script, sys.argv[:], sys.path[0] = sys.argv[at + 1], sys.argv[at + 2 :], ""
exec(script, {{"__name__": "__main__"}})
"""
"""What stands for the Python there: it is called with `-c` and a script."""


@dataclass(frozen=True)
class Far:
    """A machine behind the server. `path` goes first in PATH: its `ssh` knows the key; `cache` is the far cache."""

    port: int
    path: Path
    cache: Path
    python: Path

    @property
    def url(self) -> str:
        """How a user names it."""
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{self.python}"

    @property
    def env(self) -> dict[str, str]:
        """What a command needs to reach it."""
        return {"PATH": f"{self.path}:{os.environ['PATH']}"}


def missing() -> str:
    """Return why no server can be started here; empty where one can."""
    if SSHD is None or shutil.which("ssh") is None:
        return "no sshd here: apt-get install openssh-server"
    if os.getuid() == 0 and not SEPARATION.is_dir():
        with contextlib.suppress(OSError):
            SEPARATION.mkdir(mode=0o755)
        if not SEPARATION.is_dir():
            return f"sshd as root needs {SEPARATION}"
    return ""


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Far]:
    """Start a server whose machine has another kernel, and so is another one than this; it is pinned to one CPU."""
    assert SSHD
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    far = Far(port, folder / "bin", folder / "cache", folder / "python")
    config = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "LogLevel": "ERROR",
        "SetEnv": f"XDG_CACHE_HOME={far.cache}",
    }
    (folder / "sshd_config").write_text("".join(f"{k} {v}\n" for k, v in config.items()))
    known = (folder / "host.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(known)}\n")
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder / 'user'}\nUserKnownHostsFile {folder / 'known_hosts'}\nIdentitiesOnly yes\n"
    )
    far.path.mkdir()
    _script(far.path / "ssh", f'exec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"')
    (folder / "far.py").write_text(FAR)
    _script(far.python, f'exec taskset -c 0 {sys.executable} {folder / "far.py"} "$@"')
    child = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait(port)
        yield far
    finally:
        child.terminate()
        child.wait()


def _script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def _wait(port: int) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("sshd does not answer")
