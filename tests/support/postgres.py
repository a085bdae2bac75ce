"""A Postgres server of one's own on loopback, from the system's packages."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp


def binaries() -> Path | None:
    """Return where the server's programs are; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    if found:
        return found[0].parent
    initdb = shutil.which("initdb")
    return Path(initdb).parent if initdb else None


def missing() -> str:
    """Return why no server can be started here; empty where one can."""
    if binaries() is None:
        return "no Postgres server here: apt-get install postgresql"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no driver here: pip install 'llmbuild[postgres]'"
    if os.getuid() == 0 and "postgres" not in {p.pw_name for p in pwd.getpwall()}:
        return "Postgres will not run as root, and there is no user postgres"
    return ""


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Yield the URL of an empty database; the server and its files are gone afterwards."""
    folder = Path(mkdtemp(prefix="llmbuild-pg-"))
    programs = binaries()
    assert programs is not None
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    if user:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, quiet = folder / "data", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    subprocess.run(
        [programs / "initdb", "-D", data, "-A", "trust", "-U", "test", "--no-sync"], check=True, **quiet, **user
    )
    start = [programs / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start"]
    subprocess.run(start, check=True, **quiet, **user)
    try:
        yield f"postgresql://test@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], check=False, **quiet, **user)
        shutil.rmtree(folder, ignore_errors=True)
