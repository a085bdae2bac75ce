"""Measure on another machine over ssh: the client. The server is `serve`, whose local code is sent there.

The system's `ssh` is used, so that the user's configuration, keys, agents and jump hosts apply. No password is
prompted for. Files are sent once, by digest; readings are returned as those of that machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import llmbuild
from llmbuild import digest
from llmbuild.errors import InputError, NothingUsable
from llmbuild.process.child import NEUTRAL, Limits, confine, environment, program, stop_group, tail
from llmbuild.process.diagnosis import AGAIN
from llmbuild.profiler import roofline, wire
from llmbuild.profiler.protocol import Contenders, Decided, Dominated, Protocol, Quality, Stage, Subject, Tell
from llmbuild.runtime.choose import HostFacts
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import Measurement
from llmbuild.spec.rows import present
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload
from llmbuild.system.strict_json import JsonObject

SHIPPED = ("kernels", "process", "profiler", "runtime", "spec", "system")
"""The packages that the server runs."""
SINGLE = ("__init__", "digest", "errors")
"""The modules beside them."""
PIECE = 1 << 20


class Lost(Exception):
    """The connection is lost; never leaves this module."""


class Refused(Exception):
    """The server refused; never leaves this module."""


@dataclass(frozen=True)
class Judge:
    """The client's answers to the server's questions during a measurement: the client has all trials."""

    dominated: Dominated | None = None
    decided: Decided | None = None
    contenders: Contenders | None = None
    tell: Tell = lambda _: None

    def answer(self, told: JsonObject) -> JsonObject | None:
        """Return the answer to a question; None for what only informs."""
        if "stage" in told:
            self.tell(Stage(**told["stage"]))
            return None
        if "brief" in told:
            brief = [wire.measurement_of(body) for body in told["brief"]]
            return {"verb": "dominated", "why": present(self.dominated)(brief, told["perfect"])}
        if "reached" in told:
            reached = wire.measurement_of(told["reached"])
            return {"verb": "decided", "decided": present(self.decided)(reached)}
        raced = [wire.measurement_of(body) for body in told["contenders"]]
        return {"verb": "left", "left": sorted(present(self.contenders)(raced, told["reach"]))}


ASKED = {"stage", "brief", "reached", "contenders"}
NOBODY = Judge()


@dataclass(frozen=True)
class Place:
    """A machine for ssh, and its Python."""

    destination: str
    port: int | None = None
    python: str = "python3"
    leased: bool = False
    """Whether others wait for it while there is a connection: then there is one only while something is measured."""

    def command(self, script: str) -> list[str]:
        """Return the command that runs a Python script there."""
        port = ["-p", str(self.port)] if self.port else []
        alive = ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3", "-o", "ConnectTimeout=15"]
        far = shlex.join([self.python, *alone(script)])
        return [program("ssh"), "-T", "-o", "BatchMode=yes", *alive, *port, "--", self.destination, far]

    def pasted(self, command: str) -> str:
        """Return a command of that machine, to be given here."""
        return f"ssh {self.destination} {shlex.quote(command)}"


def alone(script: str) -> list[str]:
    """Return the arguments of a Python that runs a script.

    Neither the working folder nor environment variables affect its imports; old Pythons lack -P.
    """
    return ["-E", "-c", f"import sys; sys.path.remove(''); {script}"]


def place_of(text: str) -> Place:
    """Return the place of `ssh://[USER@]HOST[:PORT][/PATH/TO/PYTHON]`.

    Raises:
        InputError: not of this form.
    """
    asked = f"--on {text!r}: write ssh://[USER@]HOST[:PORT][/PATH/TO/PYTHON]"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InputError(f"{asked}: {error}") from None
    if parts.scheme != "ssh" or not parts.hostname or parts.password or parts.query or parts.fragment:
        raise InputError(asked)
    name = parts.netloc.rpartition("@")[2].removesuffix(f":{port}" if port else "")
    destination = f"{parts.username}@{name}" if parts.username else name
    return Place(destination, port, parts.path if parts.path.strip("/") else "python3")


class Connection:
    """A connection to a running server: one request, one answer."""

    def __init__(self, place: Place) -> None:
        """Connect, and send the code where it is missing.

        Raises:
            Lost: no connection, or no Python there.
            Refused: the machine cannot run the server.
        """
        self.place = place
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        code = archive()
        name = digest.of_bytes(code)
        script = f"exec(sys.stdin.buffer.read({len(_bootstrap(name, len(code)))}))"
        try:
            self._process = subprocess.Popen(
                place.command(script),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                start_new_session=True,
                env=environment(),
                cwd=NEUTRAL,
                preexec_fn=confine(Limits()),
            )
        except OSError as error:
            raise Lost(f"cannot start ssh: {error}") from None
        try:
            self._send(_bootstrap(name, len(code)))
            if self._answer().get("send"):
                self._send(code)
            while "serving" not in self._answer():
                continue
        except BaseException:  # any exception, Ctrl-C too: ssh must not outlive it; raised again
            self.close()
            raise

    def ask(self, verb: str, judge: Judge = NOBODY, /, **request: object) -> JsonObject:
        """Return the answer; `judge` answers the server's questions in between.

        Raises:
            Lost, Refused: there is no answer, or it is a refusal.
        """
        self._send(_line({"verb": verb, **request}))
        while ASKED & (told := self._answer()).keys():
            answer = judge.answer(told)
            if answer is not None:
                self._send(_line(answer))
        return told

    def put(self, files: Mapping[str, Path]) -> int:
        """Send the files, by digest, that the server lacks; return their bytes."""
        sent = 0
        for name in self.ask("have", blobs=sorted(files))["missing"]:
            size = files[name].stat().st_size
            self._send(_line({"verb": "put", "blob": name, "bytes": size}))
            with open(files[name], "rb") as file:
                while piece := file.read(PIECE):
                    self._send(piece)
            self._answer()
            sent += size
        return sent

    def close(self) -> None:
        """End the server, which ends its children."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        stop_group(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()
        if not self._log.closed:
            self._log.close()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise Lost(self._last_words()) from None

    def _answer(self) -> JsonObject:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise Lost(self._last_words())
        try:
            told: JsonObject = json.loads(line)
        except ValueError:
            raise Refused(f"what answers there is not llmbuild: {line[:80]!r}") from None
        if "refused" in told:
            raise Refused(str(told["refused"]))
        return told

    def _last_words(self) -> str:
        if self._log.closed:
            return "it was closed"
        self._process.wait()
        lines = [line for line in tail(self._log.fileno()).splitlines() if line.strip()]
        return lines[-1] if lines else f"ssh ended with {self._process.returncode}"


class Remote:
    """A remote machine that measures; connected on first use, and again after a lost connection."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.sent_bytes = 0
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        """The connection.

        Raises:
            Lost, Refused: it cannot be made.
        """
        if self._connection is None:
            self._connection = Connection(self.place)
        return self._connection

    def drop(self) -> None:
        """Drop a lost connection."""
        self.close()

    def close(self) -> None:
        """End the server."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @cached_property
    def _facts(self) -> JsonObject:
        try:
            found = self.connection.ask("facts")
        except (Lost, Refused) as error:
            self.close()
            raise NothingUsable(f"{self.place.destination}: cannot be measured on: {error}") from None
        if self.place.leased:
            self.close()
        return found

    @property
    def machine(self) -> Machine:
        """The machine's record.

        Raises:
            NothingUsable: it cannot be reached, or cannot run the server.
        """
        return wire.machine_of(self._facts["machine"])

    @property
    def facts(self) -> HostFacts:
        """The facts that decide which artifacts may be opened there."""
        told, machine = self._facts, self.machine
        features = frozenset(told["features"])
        return HostFacts(machine.arch, features, told["runtime"], told["memory_bytes"], digest.of(machine))

    def put(self, files: Mapping[str, Path]) -> None:
        """Send missing files."""
        self.sent_bytes += self.connection.put(files)

    def roofline(self, compile_: roofline.Compile, seconds: float) -> roofline.Roofline | Failure:
        """Compile the limit kernels of that machine here, run them there, and return its limits."""
        try:
            told = self.connection.ask("limits")
            with tempfile.TemporaryDirectory(prefix="llmbuild-") as name:
                source, artifact = Path(name) / "limits.mlir", Path(name) / "limits.vmfb"
                source.write_text(told["source"])
                if failure := compile_(source, artifact):
                    return failure
                blob = digest.of_file(artifact)
                self.put({blob: artifact})
            answer = self.connection.ask("roofline", artifact=blob, plan=told["plan"], seconds=seconds)
        except (Lost, Refused) as error:
            return self.failure(error)
        return wire.failure_of(answer["failure"]) if "failure" in answer else roofline.from_body(answer["roofline"])

    def failure(self, error: Lost | Refused) -> Failure:
        """Return the failure for a missing answer: it is transient, a later build tries again."""
        lost = isinstance(error, Lost)
        if lost:
            self.drop()
        reason = f"the connection to {self.place.destination} was lost: {error}" if lost else str(error)
        command = shlex.join(self.place.command("print('hello')"))
        return Failure("profile", f"{reason}; {AGAIN}", command, "", lasting=False)


class RemoteBench:
    """A `Bench` on another machine."""

    def __init__(
        self,
        remote: Remote,
        workloads: Sequence[Workload],
        quality: Quality,
        protocol: Protocol,
        limits: roofline.Roofline | None,
        target: Target,
        runtime: str,
    ) -> None:
        self.remote, self.quality = remote, quality
        self._body = wire.bench_body(tuple(workloads), quality, protocol, target, runtime, limits)
        self.tell: Tell = lambda _: None
        self._standing: Connection | None = None
        self._baseline = False

    @property
    def has_baseline(self) -> bool:
        """Return whether a baseline is open for pairing: it is lost with the connection."""
        return self._baseline and self._standing is not None and self._standing is self.remote._connection

    def measure(
        self,
        subject: Subject,
        baseline: bool = False,
        dominated: Dominated | None = None,
        decided: Decided | None = None,
    ) -> tuple[Measurement, ...] | Failure:
        """Return a measurement for each workload, as `Bench.measure` does, or why there is none."""
        asked = {"baseline": baseline, "screen": dominated is not None, "stop": decided is not None}
        told = self._ask("measure", subject, Judge(dominated, decided, tell=self.tell), **asked)
        if isinstance(told, Failure):
            return told
        self._baseline = self._baseline or baseline
        return tuple(wire.measurement_of(body) for body in told["measurements"])

    def open_baseline(self, subject: Subject) -> Failure | None:
        """Open the baseline for pairing, as `Bench.open_baseline` does; return why that failed."""
        told = self._ask("baseline", subject, Judge(tell=self.tell))
        if isinstance(told, Failure):
            return told
        self._baseline = True
        return None

    def _ask(self, verb: str, subject: Subject, judge: Judge, **asked: object) -> JsonObject | Failure:
        try:
            self._ready([subject])
            told = self.remote.connection.ask(verb, judge, subject=wire.subject_body(subject), **asked)
        except (Lost, Refused) as error:
            return self.remote.failure(error)
        return self._remote_failure(wire.failure_of(told["failure"])) if "failure" in told else told

    def race(self, subjects: Sequence[Subject], contenders: Contenders | None = None) -> list[tuple[Measurement, ...]]:
        """Measure the survivors again, as `Bench.race` does; nothing where the connection was lost."""
        everyone = {s.variant for s in subjects}
        judge = Judge(contenders=contenders or (lambda *_: everyone), tell=self.tell)
        try:
            self._ready(subjects)
            asked = [wire.subject_body(s) for s in subjects]
            told = self.remote.connection.ask("race", judge, subjects=asked)
        except (Lost, Refused) as error:
            self.remote.failure(error)
            return []
        return [tuple(wire.measurement_of(body) for body in bodies) for bodies in told["raced"]]

    def close(self) -> None:
        """End the processes there."""
        self.remote.close()
        self._standing, self._baseline = None, False

    def _ready(self, subjects: Sequence[Subject]) -> None:
        """Send missing files, and make the bench again on a new connection."""
        files = {name: path for subject in subjects for name, path in wire.files_of(subject).items()}
        if self.quality.data is not None:
            files[self.quality.data.name] = self.quality.data
        connection = self.remote.connection
        self.remote.put(files)
        if self._standing is not connection:
            connection.ask("bench", **self._body)
            self._standing, self._baseline = connection, False

    def _remote_failure(self, failure: Failure) -> Failure:
        return replace(failure, command=self.remote.place.pasted(failure.command))


def archive(*more: str) -> bytes:
    """Return the server's code, and `more` modules, as a zip with the same bytes for the same code."""
    root = Path(llmbuild.__file__).parent
    packages = [path for name in SHIPPED for path in sorted((root / name).rglob("*.py"))]
    files = [*(root / f"{name}.py" for name in (*SINGLE, *more)), *packages]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for path in files:
            name = zipfile.ZipInfo(f"llmbuild/{path.relative_to(root).as_posix()}")
            made.writestr(name, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _bootstrap(code: str, size: int) -> bytes:
    text = Path(__file__).with_name("bootstrap.py").read_text()
    return f"CODE, SIZE = {code!r}, {size}\n{text}".encode()


def _line(request: JsonObject) -> bytes:
    return json.dumps(request).encode() + b"\n"
