"""The server of a remote measurement: JSON requests on stdin, one JSON answer a line on stdout; files by digest.

facts    {}                              -> machine, runtime, memory_bytes
have     {blobs}                         -> missing: those that the cache lacks
put      {blob, bytes}, then the bytes   -> stored
limits   {}                              -> source: kernels to compile, and their arguments
roofline {artifact, plan, seconds}       -> roofline, or failure
bench    {workloads, quality, ...}       -> ready, or refused where this host must not open the target
baseline {subject}                       -> opened, or failure
measure  {subject, baseline, screen, ...} -> measurements, or failure
race     {subjects}                      -> raced

In between, a measurement may ask {brief, perfect} (the answer is {why}) or {reached} ({decided}), a race {contenders,
reach} ({left}); both tell {stage}, which has no answer.

The end of stdin ends all processes here: the client was interrupted, or the connection lost.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from llmbuild import digest
from llmbuild.digest import plain
from llmbuild.errors import LlmbuildError, LoadRefused
from llmbuild.process.child import Limits
from llmbuild.profiler import roofline, wire
from llmbuild.profiler.bench import Bench
from llmbuild.profiler.protocol import Protocol, Stage
from llmbuild.runtime import host
from llmbuild.runtime.choose import refusal
from llmbuild.runtime.model import host_facts
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import Measurement
from llmbuild.spec.variant import Failure
from llmbuild.system.strict_json import JsonObject

PIECE = 1 << 20


class Blobs:
    """Files by digest, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._intact: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Return the path of a blob."""
        if len(bytes.fromhex(name)) != 32:
            raise LlmbuildError(f"{name!r} is no digest")
        return self.folder / name

    def intact(self, name: str) -> bool:
        """Return whether a blob is present and matches its digest; it is read once."""
        path = self.path(name)
        if name not in self._intact and path.is_file() and digest.of_file(path) == name:
            self._intact.add(name)
        return name in self._intact

    def take(self, name: str, size: int, source: BinaryIO) -> None:
        """Read a blob of `size` bytes; it is stored only if its bytes match its digest."""
        path = self.path(name)
        temporary = path.with_name(f".{name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            left = size
            while left and (piece := source.read(min(left, PIECE))):
                file.write(piece)
                left -= len(piece)
        if digest.of_file(temporary) == name:
            temporary.replace(path)
        else:
            temporary.unlink()


class Requests:
    """The client's requests, read in a thread, so that its end is noticed during a measurement."""

    def __init__(self, source: BinaryIO, blobs: Blobs) -> None:
        self._source, self._blobs = source, blobs
        self._read: queue.Queue[JsonObject] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self) -> JsonObject:
        """Wait for the next request and return it."""
        return self._read.get()

    def _listen(self) -> None:
        while line := self._source.readline():
            request = json.loads(line)
            if request["verb"] == "put":
                self._blobs.take(request["blob"], request["bytes"], self._source)
            self._read.put(request)
        os._exit(0)  # workers die with the process that started them


class Server:
    """One client's measurements on this machine."""

    def __init__(self, cache: Path, source: BinaryIO, sink: TextIO) -> None:
        self.cache, self.sink = cache, sink
        self.blobs = Blobs(cache / "blobs")
        self.requests = Requests(source, self.blobs)
        self._bench: Bench | None = None

    def run(self) -> None:
        """Answer until the client is gone."""
        while True:
            request = self.requests.next()
            try:
                self.say(**getattr(self, f"do_{request.pop('verb')}")(request))
            except LlmbuildError as error:
                self.say(refused=str(error))

    def say(self, **told: object) -> None:
        """Write one line."""
        self.sink.write(json.dumps(told) + "\n")
        self.sink.flush()

    def do_facts(self, _: JsonObject) -> JsonObject:
        return {
            "machine": plain(host.machine()),
            "features": sorted(host.features()),
            "runtime": host.runtime_version(),
            "memory_bytes": host.available_memory_bytes(),
        }

    def do_have(self, request: JsonObject) -> JsonObject:
        return {"missing": [name for name in request["blobs"] if not self.blobs.intact(name)]}

    def do_put(self, request: JsonObject) -> JsonObject:
        if not self.blobs.intact(request["blob"]):
            raise LlmbuildError(f"blob {request['blob'][:12]} was damaged on the way, or the disk here is full")
        return {"stored": request["blob"]}

    def do_limits(self, _: JsonObject) -> JsonObject:
        planned = roofline.plan()
        return {"source": planned.source, "plan": planned.body()}

    def do_roofline(self, request: JsonObject) -> JsonObject:
        planned = roofline.plan_from("", request["plan"])
        found = roofline.read(planned, self.blobs.path(request["artifact"]), request["seconds"])
        return {"failure": plain(found)} if isinstance(found, Failure) else {"roofline": plain(found)}

    def do_bench(self, request: JsonObject) -> JsonObject:
        self.close()
        why = unfit(request["target"], request["runtime"])
        if why:
            raise LoadRefused(why)
        self._bench = bench_of(request, self.blobs.path)
        self._bench.tell = self._tell
        return {"ready": True}

    def do_baseline(self, request: JsonObject) -> JsonObject:
        failure = self._opened.open_baseline(wire.subject_of(request["subject"], self.blobs.path))
        return {"failure": plain(failure)} if failure else {"opened": True}

    def do_measure(self, request: JsonObject) -> JsonObject:
        subject = wire.subject_of(request["subject"], self.blobs.path)
        dominated = self._dominated if request["screen"] else None
        decided = self._decided if request["stop"] else None
        found = self._opened.measure(subject, request["baseline"], dominated, decided)
        return {"failure": plain(found)} if isinstance(found, Failure) else {"measurements": plain(found)}

    def do_race(self, request: JsonObject) -> JsonObject:
        subjects = [wire.subject_of(body, self.blobs.path) for body in request["subjects"]]
        return {"raced": plain(self._opened.race(subjects, self._left))}

    def _left(self, measured: Sequence[Measurement], reach: float) -> set[str]:
        """Ask the client, which has all trials, which variants are undecided."""
        self.say(contenders=plain(list(measured)), reach=reach)
        return set(self.requests.next()["left"])

    def _dominated(self, brief: Sequence[Measurement], perfect: bool) -> str:
        """Ask the client, which has all trials, which variant surely dominates this one."""
        self.say(brief=plain(list(brief)), perfect=perfect)
        return str(self.requests.next()["why"])

    def _decided(self, reached: Measurement) -> bool:
        """Ask the client, which has all trials, whether more rounds of this variant would add anything."""
        self.say(reached=plain(reached))
        return bool(self.requests.next()["decided"])

    def _tell(self, stage: Stage) -> None:
        self.say(stage=plain(stage))

    @property
    def _opened(self) -> Bench:
        if self._bench is None:
            raise LlmbuildError("no bench was asked for")
        return self._bench

    def close(self) -> None:
        """End the earlier bench."""
        if self._bench is not None:
            self._bench.close()


def unfit(target: JsonObject, runtime: str) -> str:
    """Return why this host must not open artifacts of a target, as the loader would; empty where it may."""
    why = refusal({"artifact": "to come", "runtime": runtime, "target_body": target}, host_facts())
    return f"the target {why}" if why else ""


def bench_of(
    body: JsonObject, where: wire.Where, machine: Machine | None = None, limits: Limits | None = None
) -> Bench:
    """Return the bench of a job's description, on this machine; `limits` are those of one request."""
    known = roofline.from_body(body["limits"]) if body["limits"] else None
    return Bench(
        wire.workloads_of(body),
        wire.quality_of(body, where),
        digest.of(machine or host.machine()),
        limits or Limits(),
        Protocol(**body["protocol"]),
        known,
    )


def main(cache: str) -> None:
    """Serve the client; of two at once, the second waits, since they would disturb each other."""
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < PIECE:
        print(json.dumps({"refused": f"the disk of {folder} is full"}), flush=True)
        return
    with open(folder / ".measuring", "w") as lock:
        sink, sys.stdout = sys.stdout, sys.stderr  # output of libraries is not an answer
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sink.write(json.dumps({"waiting": True}) + "\n")
            sink.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
        sink.write(json.dumps({"serving": True}) + "\n")
        sink.flush()
        Server(folder, sys.stdin.buffer, sink).run()
