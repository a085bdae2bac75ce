"""Call the functions of a compiled `llmbuild.kernels.limits` and time them; runs in the profiler's worker."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, perf_counter

import iree.runtime as rt
import numpy as np

from llmbuild.runtime.calls import PolledCaller
from llmbuild.runtime.code import mapped
from llmbuild.runtime.session import threaded_device
from llmbuild.system.strict_json import JsonObject

LEAST_ROUNDS = 5


class Calls:
    """One artifact of limit kernels on a device with a thread pinned to each core, and the bytes its functions read.

    Unpinned threads are placed on one core when they are woken together, and reach no limit.
    """

    def __init__(self, artifact: Path, read_bytes: int) -> None:
        self._device = threaded_device(workers=0)
        self._instance = rt.VmInstance()
        self._module = mapped(self._instance, artifact)
        modules = [rt.create_hal_module(self._instance, self._device), self._module]
        self._context = rt.VmContext(self._instance, modules)
        self._data = self._device.allocator.allocate_buffer_copy(
            memory_type=rt.MemoryType.DEVICE_LOCAL | rt.MemoryType.HOST_VISIBLE,
            allowed_usage=rt.BufferUsage.DEFAULT | rt.BufferUsage.MAPPING,
            device=self._device,
            buffer=np.zeros(read_bytes, np.int8),  # does not reuse memory: up to 2 GiB are copied
            element_type=rt.HalElementType.SINT_8,
        )
        self._callers: dict[str, PolledCaller] = {}

    def seconds(self, function: str) -> float:
        """Return how long one call took, including its result."""
        called = self._module.lookup_function(function)
        call = self._callers.setdefault(function, PolledCaller(self._device, self._context, 1))
        begin = perf_counter()
        call(called, [self._data], alike="limit")
        return perf_counter() - begin

    def close(self) -> None:
        """Release everything, buffers before the device and code after it, as a `Session` does."""
        for name in ("_callers", "_data", "_context", "_instance", "_device", "_module"):
            self.__dict__.pop(name, None)


def run(request: JsonObject) -> dict[str, object]:
    """Answer {artifact, read_bytes, functions, seconds} with the seconds of each function, round by round."""
    calls = Calls(Path(request["artifact"]), request["read_bytes"])
    try:
        return {"samples": _rounds(calls, request["functions"], request["seconds"])}
    finally:
        calls.close()


def _rounds(calls: Calls, functions: Sequence[str], seconds: float) -> dict[str, list[float]]:
    """Call all functions in every round, in random order; the first round warms up."""
    order = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for name in functions:
        calls.seconds(name)
    end, done = monotonic() + seconds, 0
    while done < LEAST_ROUNDS or monotonic() < end:
        for name in order.sample(list(functions), len(functions)):
            taken[name].append(calls.seconds(name))
        done += 1
    return taken
