"""Energy of an NVIDIA board by NVML, read-only: GPU settings are never changed.

The counter (Volta and newer) is millijoules since the driver was loaded; it updates about ten times a second. Polled
power is second best: boards sample a quarter of the time, and many report the mean of the last second. Both are of the
whole board, so under MIG, where instances share it, there is no reading.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from time import monotonic
from typing import Any

from llmbuild.profiler.meters.meter import Absent, Boundary, Clock, Counter, Energy, Source, Window

COUNTER: Source = "nvml_counter"
POLLED: Source = "nvml_polled"
STEP_S = 0.1
INSTANT_STEP_S, AVERAGE_STEP_S = 0.1, 1.0
POLL_S = 0.02
LEAST_READINGS = 10

THROTTLES = {
    "software power cap": "nvmlClocksEventReasonSwPowerCap",
    "hardware slowdown": "nvmlClocksEventReasonHwSlowdown",
    "software thermal slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "hardware thermal slowdown": "nvmlClocksEventReasonHwThermalSlowdown",
    "power brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
}
"""Reasons for a reduced clock, by the names of their bits."""


@dataclass(frozen=True)
class Board:
    """One GPU of NVML; `api` is the module `pynvml` or a replacement."""

    api: Any
    handle: Any

    def conditions(self) -> dict[str, float | str]:
        """Return the present clocks, temperature, power, its limit and memory, and the reasons for a reduced clock.

        Values that the board does not report are left out.
        """
        api, told = self.api, dict[str, float | str]()
        asked: dict[str, Callable[[], float]] = {
            "sm_clock_mhz": lambda: float(api.nvmlDeviceGetClockInfo(self.handle, api.NVML_CLOCK_SM)),
            "temperature_c": lambda: float(api.nvmlDeviceGetTemperature(self.handle, api.NVML_TEMPERATURE_GPU)),
            "memory_clock_mhz": lambda: float(api.nvmlDeviceGetClockInfo(self.handle, api.NVML_CLOCK_MEM)),
            "memory_used_bytes": lambda: float(api.nvmlDeviceGetMemoryInfo(self.handle).used),
            "power_w": lambda: api.nvmlDeviceGetPowerUsage(self.handle) / 1e3,
            "power_limit_w": lambda: api.nvmlDeviceGetPowerManagementLimit(self.handle) / 1e3,
        }
        for name, ask in asked.items():
            try:
                told[name] = ask()
            except api.NVMLError:
                continue
        try:
            bits = api.nvmlDeviceGetCurrentClocksEventReasons(self.handle)
        except api.NVMLError:
            return told
        held = [name for name, bit in THROTTLES.items() if bits & getattr(api, bit)]
        return {**told, **({"throttled": ", ".join(held)} if held else {})}


def find_counter(api: Any = None, clock: Clock = monotonic) -> Counter | Absent:
    """Return the meter with the board's total energy counter."""
    board = _board(api, COUNTER)
    if isinstance(board, Absent):
        return board

    def read() -> tuple[int, ...] | Absent:
        try:
            return (int(board.api.nvmlDeviceGetTotalEnergyConsumption(board.handle)),)
        except board.api.NVMLError as error:
            return Absent(COUNTER, f"the board's energy counter cannot be read: {error}")

    first = read()
    if isinstance(first, Absent):
        return first
    return Counter(COUNTER, "gpu", STEP_S, 1e-3, (0,), read, clock, board.conditions)


def find_polled(api: Any = None, clock: Clock = monotonic, threaded: bool = True) -> Polled | Absent:
    """Return the meter that integrates polled power: instantaneous power where the board reports it.

    Without a thread (`threaded=False`), power is read only in `keep`.
    """
    board = _board(api, POLLED)
    if isinstance(board, Absent):
        return board
    instant = _instant_watts(board)
    if not isinstance(instant, Absent):
        return Polled(INSTANT_STEP_S, lambda: _instant_watts(board), clock, threaded, board.conditions)
    plain = _watts(board)
    if isinstance(plain, Absent):
        return plain
    return Polled(AVERAGE_STEP_S, lambda: _watts(board), clock, threaded, board.conditions)


@dataclass(frozen=True)
class Polled:
    """Power polled and integrated over time by trapezoids."""

    step_s: float
    watts: Callable[[], float | Absent]
    clock: Clock
    threaded: bool
    tell: Callable[[], dict[str, float | str]]
    source: Source = POLLED
    boundary: Boundary = "gpu"

    def window(self) -> Window:
        """Start polling power."""
        return _PolledWindow(self)

    def conditions(self) -> dict[str, float | str]:
        """Return the board's conditions."""
        return self.tell()


class _PolledWindow:
    def __init__(self, meter: Polled) -> None:
        self._meter = meter
        self._taken: list[tuple[float, float]] = []
        self._lost: Absent | None = None
        self._ended = threading.Event()
        self._read()
        self._thread: threading.Thread | None = None
        if meter.threaded:
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()

    def keep(self) -> None:
        if self._thread is None:
            self._read()

    def close(self) -> Energy | Absent:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._read()
        if self._lost:
            return self._lost
        taken = self._taken
        seconds = taken[-1][0] - taken[0][0]
        if len(taken) < LEAST_READINGS:
            return Absent(POLLED, f"only {len(taken)} power readings in {seconds:.2g} s")
        joules = sum((t - s) * (p + q) / 2 for (s, p), (t, q) in pairwise(taken))
        return Energy(joules, seconds)

    def _poll(self) -> None:
        while not self._ended.wait(POLL_S):
            self._read()

    def _read(self) -> None:
        watts = self._meter.watts()
        if isinstance(watts, Absent):
            self._lost = watts
        else:
            self._taken.append((self._meter.clock(), watts))


def _board(api: Any, source: Source) -> Board | Absent:
    """Return the GPU that a process would use, or why it has no meter."""
    if api is None:
        try:
            api = importlib.import_module("pynvml")
        except ImportError:
            return Absent(source, "no NVML: pip install nvidia-ml-py")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if visible.startswith("MIG-"):
        return Absent(source, "a MIG instance has no energy reading of its own: NVML's is the whole board's")
    try:
        api.nvmlInit()
        if not api.nvmlDeviceGetCount():
            return Absent(source, "NVML sees no GPU")
        named = visible.startswith("GPU-")
        index = int(visible) if visible.isdigit() else 0
        handle = api.nvmlDeviceGetHandleByUUID(visible) if named else api.nvmlDeviceGetHandleByIndex(index)
        if _mig(api, handle):
            return Absent(source, "MIG is on: the board's energy is that of all its instances together")
    except api.NVMLError as error:
        return Absent(source, f"no NVIDIA GPU to meter: {error}")
    return Board(api, handle)


def _mig(api: Any, handle: Any) -> bool:
    try:
        current, _ = api.nvmlDeviceGetMigMode(handle)
    except api.NVMLError_NotSupported:
        return False
    return bool(current == api.NVML_DEVICE_MIG_ENABLE)


def _watts(board: Board) -> float | Absent:
    try:
        return float(board.api.nvmlDeviceGetPowerUsage(board.handle)) / 1e3
    except board.api.NVMLError as error:
        return Absent(POLLED, f"the board's power cannot be read: {error}")


def _instant_watts(board: Board) -> float | Absent:
    api = board.api
    try:
        value = api.nvmlDeviceGetFieldValues(board.handle, [api.NVML_FI_DEV_POWER_INSTANT])[0]
    except api.NVMLError as error:
        return Absent(POLLED, f"the board's power cannot be read: {error}")
    if value.nvmlReturn != 0:
        return Absent(POLLED, "the board does not report its instantaneous power")
    return float(value.value.uiVal) / 1e3
