"""Stand-ins for hardware meters: a world with a clock and a power curve, and what RAPL and NVML would show of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class World:
    """A clock that moves when told to, and the energy that a load has taken by then."""

    def __init__(self, watts: Callable[[float], float] = lambda _: 100.0) -> None:
        self.now, self.joules, self.watts = 0.0, 0.0, watts
        self.moved: list[Callable[[], None]] = []

    def clock(self) -> float:
        return self.now

    def run(self, seconds: float, keep: Callable[[], None] = lambda: None, step: float = 0.005) -> None:
        """Let time pass; `keep` is called as work would call it."""
        for _ in range(round(seconds / step)):
            self.joules += self.watts(self.now) * step
            self.now += step
            for tell in self.moved:
                tell()
            keep()


class Zones:
    """RAPL packages as files, which share the world's energy evenly and start over after `range_uj`."""

    def __init__(self, world: World, root: Path, packages: int = 1, range_uj: int = 1 << 40, start_uj: int = 0) -> None:
        self.world, self.range_uj, self.start_uj = world, range_uj, start_uj
        self.counters = []
        for number in range(packages):
            zone = root / f"intel-rapl:{number}"
            zone.mkdir(parents=True)
            (zone / "name").write_text(f"package-{number}\n")
            (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
            self.counters.append(zone / "energy_uj")
        self.write()
        world.moved.append(self.write)

    def write(self) -> None:
        each = self.start_uj + round(self.world.joules * 1e6 / len(self.counters))
        for counter in self.counters:
            counter.write_text(f"{each % self.range_uj}\n")


class NVMLError(Exception):
    """What every call of the library may raise."""


class NVMLError_NotSupported(NVMLError):  # noqa: N801 - the library's own name
    def __str__(self) -> str:
        return "Not Supported"


class NVMLError_NoPermission(NVMLError):  # noqa: N801
    def __str__(self) -> str:
        return "Insufficient Permissions"


class NVMLError_GpuIsLost(NVMLError):  # noqa: N801
    def __str__(self) -> str:
        return "GPU is lost"


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801
    def __str__(self) -> str:
        return "NVML Shared Library Not Found"


@dataclass
class FakeNvml:
    """The calls of `pynvml` that only read, replaying the world's power: the counter steps every `step_s`.

    `raises` holds, by the name of a call, the error it gives; a setter does not exist and would fail the test.
    """

    world: World
    step_s: float = 0.1
    gpus: int = 1
    mig: int | None = None
    instant: bool = True
    reasons: int = 0
    memory_used: int = 3 << 30
    sm_clock_mhz: Callable[[float], int] = lambda _: 1980
    temperature_c: Callable[[float], int] = lambda _: 41
    raises: dict[str, NVMLError] = field(default_factory=dict)
    lost_at_s: float = float("inf")
    reset_at_s: float = float("inf")
    _shown: tuple[float, float] = (0.0, 0.0)

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlClocksEventReasonSwPowerCap = 4  # noqa: N815
    nvmlClocksEventReasonHwSlowdown = 8  # noqa: N815
    nvmlClocksEventReasonSwThermalSlowdown = 32  # noqa: N815
    nvmlClocksEventReasonHwThermalSlowdown = 64  # noqa: N815
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 128  # noqa: N815

    def __post_init__(self) -> None:
        self.world.moved.append(self._step)

    def _step(self) -> None:
        if self.world.now - self._shown[0] >= self.step_s - 1e-9:
            self._shown = (self.world.now, self.world.joules)

    def _called(self, name: str) -> None:
        if self.world.now >= self.lost_at_s:
            raise NVMLError_GpuIsLost
        if name in self.raises:
            raise self.raises[name]

    def nvmlInit(self) -> None:  # noqa: N802
        self._called("nvmlInit")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMigMode(self, _: int) -> list[int]:  # noqa: N802
        if self.mig is None:
            raise NVMLError_NotSupported
        return [self.mig, self.mig]

    def nvmlDeviceGetTotalEnergyConsumption(self, _: int) -> int:  # noqa: N802
        self._called("nvmlDeviceGetTotalEnergyConsumption")
        gone = 1e6 if self.world.now < self.reset_at_s else 0.0
        return round((gone + self._shown[1]) * 1e3)

    def nvmlDeviceGetPowerUsage(self, _: int) -> int:  # noqa: N802
        self._called("nvmlDeviceGetPowerUsage")
        return round(self.world.watts(self.world.now) * 1e3)

    def nvmlDeviceGetFieldValues(self, _: int, fields: list[int]) -> list[Any]:  # noqa: N802
        self._called("nvmlDeviceGetFieldValues")
        assert fields == [self.NVML_FI_DEV_POWER_INSTANT]
        value = SimpleNamespace(uiVal=round(self.world.watts(self.world.now) * 1e3))
        return [SimpleNamespace(nvmlReturn=0 if self.instant else 3, value=value)]

    def nvmlDeviceGetClockInfo(self, _: int, kind: int) -> int:  # noqa: N802
        self._called("nvmlDeviceGetClockInfo")
        if kind == self.NVML_CLOCK_MEM:
            return 2619
        assert kind == self.NVML_CLOCK_SM
        return self.sm_clock_mhz(self.world.now)

    def nvmlDeviceGetTemperature(self, _: int, kind: int) -> int:  # noqa: N802
        assert kind == self.NVML_TEMPERATURE_GPU
        return self.temperature_c(self.world.now)

    def nvmlDeviceGetMemoryInfo(self, _: int) -> Any:  # noqa: N802
        self._called("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(used=self.memory_used, total=80 << 30)

    def nvmlDeviceGetName(self, _: int) -> str:  # noqa: N802
        return "NVIDIA H100"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "550.54"

    def nvmlDeviceGetPowerManagementLimit(self, _: int) -> int:  # noqa: N802
        self._called("nvmlDeviceGetPowerManagementLimit")
        return 700_000

    def nvmlDeviceGetCurrentClocksEventReasons(self, _: int) -> int:  # noqa: N802
        return self.reasons
