"""The measured limits of this machine: bytes read and arithmetic per second, and the share that a variant reaches.

Decoding one token reads every weight and the cache once, so its time is at least those bytes over the bandwidth; a
prompt multiplies every weight with each of its tokens, so its time is at least that work over the arithmetic peak.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmbuild.kernels import limits
from llmbuild.process.child import Limits
from llmbuild.profiler import noise, statistics
from llmbuild.profiler.child import Child, ChildFailed
from llmbuild.runtime import host
from llmbuild.spec.measurement import Reading
from llmbuild.spec.program import Abi
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload
from llmbuild.system.strict_json import JsonObject

LEAST_BYTES, MOST_BYTES, CACHES = 256 << 20, 2 << 30, 8
"""The buffer is this many times the last-level cache, between the two bounds."""

Compile = Callable[[Path, Path], Failure | None]
"""Compiles MLIR (first path) for this host into a `.vmfb` (second path); None on success."""


@dataclass(frozen=True)
class Rates:
    """Total rates of a number of workers: bytes read per second, and multiply-adds per second."""

    workers: int
    read_bytes_per_s: Reading
    f32_flop_per_s: Reading
    int8_op_per_s: Reading | None
    """None where llmbuild has no kernel for this machine's int8 instructions; `Roofline.notes` has the reason."""


@dataclass(frozen=True)
class Roofline:
    """The limits of a machine with one worker and with all cores; readings are medians with 95 % intervals."""

    one: Rates
    all: Rates
    buffer_bytes: int
    notes: tuple[str, ...]

    def of(self, driver: str, workers: int) -> Rates:
        """Return the rates for a variant's run-time settings (`workers` 0 is one per core)."""
        alone = driver == "local-sync" or workers == 1
        return self.one if alone else self.all


def from_body(body: JsonObject) -> Roofline:
    """Return the limits from their JSON form."""

    def rates(found: JsonObject) -> Rates:
        readings = {
            k: None if v is None else Reading(**{**v, "samples": tuple(v["samples"])})
            for k, v in found.items()
            if k != "workers"
        }
        return Rates(workers=found["workers"], **readings)  # type: ignore[arg-type]

    return Roofline(rates(body["one"]), rates(body["all"]), body["buffer_bytes"], tuple(body["notes"]))


@dataclass(frozen=True)
class Work:
    """The work of a variant: bytes that each decode step reads, and operations of the prompt."""

    parameter_bytes: int
    kv_bytes: float
    prefill_operations: int


@dataclass(frozen=True)
class Fractions:
    """The shares of the limits that a variant reaches; more than 1 means that it does less work than counted."""

    decode_of_bandwidth: Reading
    prefill_of_f32: Reading
    prefill_of_int8: Reading | None


def buffer_bytes(workers: int) -> int:
    """Return the size of the buffer: far larger than the last-level cache, and whole cache lines for each worker."""
    wanted = min(max(LEAST_BYTES, CACHES * _last_level_cache_bytes()), MOST_BYTES)
    piece = 512 * workers
    return -(-wanted // piece) * piece


@dataclass(frozen=True)
class Plan:
    """Limit kernels for one machine: their MLIR, their numbers of workers, and their arguments."""

    source: str
    workers: tuple[int, ...]
    features: tuple[str, ...]
    read_bytes: int

    def body(self) -> dict[str, object]:
        """Return the plan as JSON, without the MLIR."""
        return {"workers": list(self.workers), "features": list(self.features), "read_bytes": self.read_bytes}


def plan_from(source: str, body: JsonObject) -> Plan:
    """Return a plan from its JSON form."""
    return Plan(source, tuple(body["workers"]), tuple(body["features"]), body["read_bytes"])


def plan(size: int = 0) -> Plan:
    """Return the plan for this host; `size` is the buffer's bytes, a multiple of 512 for each core; 0 chooses."""
    cores, features = host.cores(), host.features()
    counts, size = sorted({1, cores}), size or buffer_bytes(cores)
    return Plan(limits.module(features, counts, size), tuple(counts), tuple(sorted(features)), size)


def measure(compile_: Compile, seconds: float = 3.0, size: int = 0) -> Roofline | Failure:
    """Compile the limit kernels, run them in a separate process for about `seconds` and return the limits.

    The notes list disturbances.
    """
    planned = plan(size)
    with TemporaryDirectory(prefix="llmbuild-") as folder:
        source, artifact = Path(folder) / "limits.mlir", Path(folder) / "limits.vmfb"
        source.write_text(planned.source)
        return compile_(source, artifact) or read(planned, artifact, seconds)


def read(planned: Plan, artifact: Path, seconds: float) -> Roofline | Failure:
    """Run compiled limit kernels on this host and return its limits."""
    features, size = frozenset(planned.features), planned.read_bytes
    before = noise.snapshot()
    try:
        taken = _samples(artifact, list(planned.workers), features, size, seconds)
    except ChildFailed as error:
        return error.failure
    noisy = noise.verdict(before, noise.snapshot(), max(planned.workers))
    notes = [f"noise: {noisy}"] if noisy else []
    if not limits.has_int8(features):
        notes.append("int8: no kernel for this machine's int8 instructions; the f32 peak alone is given")
    found = [_rates(n, taken, features, size) for n in planned.workers]
    return Roofline(found[0], found[-1], size, tuple(notes))


def work(abi: Abi, parameter_bytes: int, workload: Workload, head_parameters: int = 0) -> Work:
    """Return the work of a variant for a workload; cache bytes are those of its middle output token.

    `head_parameters` are the weights of the output matrix, which only the last token of a prompt uses; with 0 every
    weight is counted for every token. Attention itself, small at short prompts, is not counted.
    """
    filled = min(workload.prompt + workload.output / 2, abi.context)
    cached = sum(math.prod(t.shape) * _width(t.dtype) for t in abi.kv)
    layers = abi.parameters - head_parameters
    operations = 2 * abi.batch * (layers * workload.prompt + head_parameters)
    return Work(parameter_bytes, cached * filled / abi.context, operations)


def fractions(rates: Rates, done: Work, tpot: Reading, ttft: Reading) -> Fractions:
    """Return the shares of the limits that a variant reaches; intervals combine the extremes of both sides."""
    int8 = rates.int8_op_per_s
    return Fractions(
        decode_of_bandwidth=_fraction(done.parameter_bytes + done.kv_bytes, tpot, rates.read_bytes_per_s),
        prefill_of_f32=_fraction(done.prefill_operations, ttft, rates.f32_flop_per_s),
        prefill_of_int8=_fraction(done.prefill_operations, ttft, int8) if int8 is not None else None,
    )


def _fraction(amount: float, took: Reading, limit: Reading) -> Reading:
    return Reading(
        amount / took.median / limit.median, amount / took.high / limit.high, amount / took.low / limit.low, ()
    )


def _samples(
    artifact: Path, counts: list[int], features: frozenset[str], size: int, seconds: float
) -> dict[str, list[float]]:
    names = [limits.READ, *limits.operations(features, 1)]
    child = Child(Limits(seconds=60 + 4 * seconds))
    try:
        answer = child.ask(
            "profile",
            "limits",
            artifact=str(artifact),
            read_bytes=size,
            functions=[limits.function(name, n) for n in counts for name in names],
            seconds=seconds,
        )
    finally:
        child.close()
    return dict(answer["samples"])


def _rates(workers: int, taken: dict[str, list[float]], features: frozenset[str], size: int) -> Rates:
    amounts = {limits.READ: size, **limits.operations(features, workers)}
    read = {
        name: statistics.median_of([amount / s for s in taken[limits.function(name, workers)]])
        for name, amount in amounts.items()
    }
    return Rates(workers, read[limits.READ], read[limits.F32], read.get(limits.INT8))


def _width(dtype: str) -> int:
    """Return the byte width of an element type from its name: `float16`, `int8`."""
    match = re.search(r"\d+$", dtype)
    return int(match[0]) // 8 if match else 1


def _last_level_cache_bytes() -> int:
    """Return the size of the largest cache of CPU 0; 0 where unknown."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG])\s*", path.read_text())
        if match:
            found.append(int(match[1]) * units[match[2]])
    return max(found)
