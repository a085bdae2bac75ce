"""Nodes that are taken out of service while a fleet runs: a file in its state folder, which its orchestrator reads.

Whoever takes a node out, for maintenance or because it has failed, need not end the fleet: what runs on it is replaced
elsewhere first, as far as there is room, then drained. A node that is given back is planned with again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from llmbuild.errors import InputError
from llmbuild.system.strict_json import dumps

FILE = "nodes-out.json"


class NodesOut:
    """The names of nodes that are out of service, of the fleet whose state is in a folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE

    def read(self) -> frozenset[str]:
        """Return the names; none where there is no file.

        Raises:
            InputError: the file is not ours.
        """
        try:
            found = json.loads(self._file.read_text())
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError) as error:
            raise InputError(f"{self._file}: cannot be read ({type(error).__name__}): remove it") from None
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise InputError(f"{self._file}: is no list of nodes: remove it")
        return frozenset(found)

    def change(self, out: Iterable[str], back: Iterable[str]) -> frozenset[str]:
        """Take nodes out of service, and give others back; return all that are out.

        Raises:
            InputError: the file is not ours, or cannot be written.
        """
        found = (self.read() | set(out)) - set(back)
        temporary = self._file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(dumps(sorted(found)))
            temporary.replace(self._file)
        except OSError as error:
            raise InputError(f"{self._file}: cannot be written ({error.strerror}): name another --state") from None
        return found
