"""A compile on another machine: what is sent, what is made there, and what becomes of it here.

Everything goes by content. What comes back is whole and has its digest, or is a failure: no file is shared, so none is
read half-written. The work is a function of what is sent; a node that dies with it has done nothing, and another one
does it again. Names of temporary files have the length that they have here, and are put back: compilers write them
into their outputs, whose bytes must not depend on where they were made.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import llmbuild
from llmbuild import digest
from llmbuild.compiler import iree
from llmbuild.compiler.calls import Call, here
from llmbuild.process.child import Limits, address_limit, stopped_with_all
from llmbuild.process.diagnosis import AGAIN
from llmbuild.spec.variant import Failure

TRIES = 3
"""Times that work is begun again, after its node was lost."""


class Gone(Exception):
    """The cluster has not done the work: nodes were lost, it was cancelled, or nobody answers."""


@dataclass(frozen=True)
class Sent:
    """A call with the bytes of its source."""

    call: Call
    source: bytes
    seconds: float
    bounded: bool
    """Whether its addresses are bounded by the memory of who runs it."""
    versions: tuple[str, str]
    """Of llmbuild and of the compiler: who works must have the same."""


@dataclass(frozen=True)
class Made:
    """What a call wrote, by the name of the file, or why not; and where."""

    files: Mapping[str, bytes]
    digests: Mapping[str, str]
    failure: Failure | None
    where: str


class Farm(Protocol):
    """Runs `work` somewhere: the narrow seam to a cluster."""

    def submit(self, sent: Sent) -> tuple[Callable[[], Made], Callable[[], None]]:
        """Begin, and return what waits for the answer, which may raise Gone, and what cancels the work.

        Raises:
            Gone: it cannot be begun.
        """


def versions() -> tuple[str, str]:
    """Return what decides the bytes of a compile besides its inputs."""
    return llmbuild.__version__, iree.compiler_version()


class Afar:
    """Runs calls on a farm."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self.nodes: dict[str, int] = {}
        """Calls that each node has answered."""

    def __call__(self, call: Call, limits: Limits) -> Failure | None:
        """Send a call, wait for its files, and write them here."""
        sent = Sent(call, call.source.read_bytes(), limits.left_s(), bool(limits.memory_bytes), versions())
        try:
            wait, cancel = self._farm.submit(sent)
            with stopped_with_all(cancel):
                made = wait()
        except Gone as error:
            return Failure("compile", f"{error}; {AGAIN}", "", "", lasting=False)
        self.nodes[made.where] = self.nodes.get(made.where, 0) + 1
        if made.failure is not None:
            return made.failure
        return self._written(call, made)

    @staticmethod
    def _written(call: Call, made: Made) -> Failure | None:
        for path in (call.output, *([call.beside] if call.beside else [])):
            data = made.files.get(path.name)
            if data is None and path != call.output:
                continue  # a second file may be left out, as on this machine
            if data is None or digest.of_bytes(data) != made.digests.get(path.name):
                return Failure("compile", f"{path.name} came back damaged; {AGAIN}", "", "", lasting=False)
            path.write_bytes(data)
        return None


def work(sent: Sent, where: str = "") -> Made:
    """Run a call on this machine for somebody else."""
    if sent.versions != versions():
        (ours, our), (theirs, their) = versions(), sent.versions
        told = f"llmbuild {ours} and iree-base-compiler {our}, the build {theirs} and {their}"
        reason = f"node {where} has {told}: install the same on all nodes"
        return Made({}, {}, Failure("compile", reason, "", "", lasting=False), where)
    call = sent.call
    with _folder(call.output.parent) as folder:
        mine = _moved(call, folder)
        mine.source.write_bytes(sent.source)
        failure = here(mine, Limits(sent.seconds, address_limit() if sent.bounded else 0))
        if failure is not None:
            reason, command, log = (
                _put_back(text, folder, call) for text in (failure.reason, failure.command, failure.log)
            )
            return Made({}, {}, replace(failure, reason=reason, command=command, log=log), where)
        paths = [mine.output, *([mine.beside] if mine.beside and mine.beside.is_file() else [])]
        files = {path.name: _renamed(path.read_bytes(), folder, call) for path in paths}
    return Made(files, {name: digest.of_bytes(data) for name, data in files.items()}, None, where)


@contextmanager
def _folder(there: Path) -> Iterator[Path]:
    """Yield a new folder here whose path has the length of another one, and remove it."""
    random = min(8, len(there.name))
    there.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = there.with_name(there.name[: len(there.name) - random] + secrets.token_hex(8)[:random])
        try:
            folder.mkdir(mode=0o700)
            break
        except FileExistsError:
            continue
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _moved(call: Call, folder: Path) -> Call:
    """Return a call with its files in another folder."""
    beside = folder / call.beside.name if call.beside else None
    flags = call.flags
    if call.beside and beside:
        flags = tuple(word.replace(str(call.beside), str(beside)) for word in flags)
    return Call(call.tool, folder / call.source.name, flags, folder / call.output.name, beside)


def _renamed(data: bytes, folder: Path, call: Call) -> bytes:
    """Return an output with the paths of who asked; in what is no text, only such of the same length."""
    if b"\0" not in data:
        data = data.replace(os.fsencode(folder / call.source.name), os.fsencode(call.source))
    return data.replace(os.fsencode(folder), os.fsencode(call.output.parent))


def _put_back(text: str, folder: Path, call: Call) -> str:
    """Return a text with the paths that the call has on the machine of who asked."""
    return text.replace(str(folder / call.source.name), str(call.source)).replace(str(folder), str(call.output.parent))
