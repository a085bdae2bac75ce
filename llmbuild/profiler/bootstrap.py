"""The first text that a remote machine is sent: it receives the profiler's code, unless cached, and runs it.

Needs only a standard library, and nothing of llmbuild; `CODE` and `SIZE` are set before it. An old Python must be able
to parse it, to report that it is too old.
"""

import contextlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

CODE = globals().get("CODE", "")
"""Digest of the code."""
SIZE = globals().get("SIZE", 0)
"""Bytes of its archive."""


def _say(**told: object) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _unpack(data: bytes, folder: Path) -> None:
    made = folder.with_name(f"{folder.name}.{os.getpid()}")
    zipfile.ZipFile(io.BytesIO(data)).extractall(str(made))
    with contextlib.suppress(OSError):  # another process was first
        made.rename(folder)


def _main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this reports the version
        found = ".".join(map(str, sys.version_info[:2]))
        _say(refused=f"its Python is {found}, 3.11 or newer is needed: name another one after the host")
        return
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = (named if named.is_absolute() else Path.home() / ".cache") / "llmbuild"
    folder = cache / "code" / CODE
    folder.parent.mkdir(parents=True, exist_ok=True)
    there = folder.is_dir()
    _say(send=not there)
    if not there:
        _unpack(sys.stdin.buffer.read(SIZE), folder)
    sys.path.insert(0, str(folder))
    try:
        from llmbuild.profiler import serve
    except ImportError as error:
        _say(refused=f"{error}: `{sys.executable} -m pip install iree-base-runtime numpy` there")
        return
    serve.main(str(cache))


if CODE:
    _main()
