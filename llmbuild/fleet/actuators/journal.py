"""What runs where, on disk, so that whoever comes after a kill -9 knows it; and processes told by more than a number.

The file is written to a temporary name, synced and renamed: it is whole at any moment. A pid alone may belong to
somebody else by now, so an entry also has the time at which its process began, by the kernel's clock. Processes that
were started and not yet written down are found by a mark in their environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmbuild.errors import InputError
from llmbuild.system.strict_json import dumps

VERSION = 1
MARK = "LLMBUILD_FLEET_REPLICA"
"""Variable of a replica's environment: the folder of its fleet's state and its name."""
_PROC = Path("/proc")
_BEGAN = 19
"""Place of the start time in /proc/PID/stat, counted behind the name in parentheses."""


@dataclass(frozen=True)
class Entry:
    """A replica that was started: what it is, where it is, and its process."""

    name: str
    service: str
    variant: str
    batch: int
    clock_mhz: int
    node: str
    slot: int
    pid: int
    began: int
    """Clock ticks from the host's boot to the process's start."""
    boot: str
    """Which boot of the host it was."""
    keys: str = ""
    """Digest of the API keys that it takes."""


class Journal:
    """The entries of one fleet in one folder, which one orchestrator has at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "state.json"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other orchestrators away; the kernel frees the lock, whatever ends its holder.

        Raises:
            InputError: another one runs, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}): name another --state") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                told = f"{self.folder}: another orchestrator runs this fleet"
                raise InputError(f"{told}: end it, or name another --state") from None
            yield

    def read(self) -> tuple[Entry, ...]:
        """Return the entries; none where there is no file.

        Raises:
            InputError: the file is not ours, or of another version.
        """
        try:
            found: Any = json.loads(self._file.read_text())
            if found["version"] != VERSION:
                raise InputError(
                    f"{self._file}: of version {found['version']}, {VERSION} is read: end its orchestrator"
                )
            return tuple(Entry(**one) for one in found["replicas"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as error:
            told = f"{self._file}: cannot be read ({type(error).__name__})"
            raise InputError(f"{told}: remove it; replicas that still run are found and ended") from None

    def write(self, entries: Sequence[Entry]) -> None:
        """Write all entries."""
        temporary = self._file.with_suffix(".tmp")
        text = dumps({"version": VERSION, "replicas": [asdict(one) for one in entries]})
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._file)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def mark(self, name: str) -> str:
        """Return the mark of a replica's environment."""
        return f"{self.folder.resolve()}:{name}"

    def marked(self) -> dict[str, int]:
        """Return the processes that were started for this fleet by whoever was, by the replica's name."""
        prefix = f"{MARK}={self.folder.resolve()}:".encode()
        found = {}
        for folder in _PROC.iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):  # it has ended, or is somebody else's
                for word in (folder / "environ").read_bytes().split(b"\0"):
                    if word.startswith(prefix) and began_of(int(folder.name)) is not None:
                        found[word[len(prefix) :].decode(errors="replace")] = int(folder.name)
        return found


def boot_of() -> str:
    """Return which boot of the host this is."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def began_of(pid: int) -> int | None:
    """Return the clock ticks from the boot to a process's start; None where it has ended, reaped or not."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[_BEGAN])


def runs(entry: Entry) -> bool:
    """Return whether the process of an entry runs, and is not another one with its number."""
    return entry.pid > 0 and entry.boot == boot_of() and began_of(entry.pid) == entry.began
