"""GPUs in the machine record: what the kernel shows, and what the driver's library says where it is hidden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmbuild import digest
from llmbuild.runtime import host
from llmbuild.runtime.boards import boards

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)\n"


def missing(_: str) -> Any:
    raise OSError("cannot open shared object file")


class Nvml:
    """The C interface of NVML with some boards; `fails` names the call that does not succeed."""

    def __init__(self, names: tuple[str, ...], driver: str, fails: str = "") -> None:
        self.names, self.driver, self.open = names, driver, 0
        self.calls: dict[str, Callable[..., None]] = {
            "nvmlInit_v2": self.begin,
            "nvmlShutdown": self.end,
            "nvmlDeviceGetCount_v2": lambda found: setattr(found._obj, "value", len(names)),
            "nvmlSystemGetDriverVersion": lambda found, _: setattr(found, "value", driver.encode()),
            "nvmlDeviceGetHandleByIndex_v2": lambda number, handle: setattr(handle._obj, "value", number + 1),
            "nvmlDeviceGetName": lambda handle, found, _: setattr(found, "value", names[handle.value - 1].encode()),
        }
        self.fails = fails

    def begin(self) -> None:
        self.open += 1

    def end(self) -> None:
        self.open -= 1

    def __getattr__(self, name: str) -> Callable[..., int]:
        call = self.calls[name]
        return lambda *given: 999 if name == self.fails else call(*given) or 0


def shown(folder: Path, models: list[str], version: str) -> Path:
    for number, model in enumerate(models):
        gpu = folder / "gpus" / f"0000:0{number}:00.0"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 16\n")
    (folder / "version").write_text(version)
    return folder


def found(folder: Path, library: Callable[[str], Any] = missing) -> tuple[str, ...]:
    return boards(folder / "nvidia", folder / "kfd", folder / "amdgpu", library, folder / "pci")


def on_bus(folder: Path, *devices: tuple[str, str, str, str]) -> None:
    """Write devices of a bus: their class, vendor, number and driver."""
    for place, (kind, vendor, number, driver) in enumerate(devices):
        device = folder / "pci" / f"0000:0{place}:00.0"
        device.mkdir(parents=True)
        for name, value in (("class", kind), ("vendor", vendor), ("device", number)):
            (device / name).write_text(f"{value}\n")
        if driver:
            (folder / "drivers" / driver).mkdir(parents=True, exist_ok=True)
            (device / "driver").symlink_to(folder / "drivers" / driver)


def test_a_host_without_gpus_is_the_machine_that_it_was(tmp_path: Path) -> None:
    assert found(tmp_path) == ()


@pytest.mark.parametrize(("version", "driver"), [(CLOSED, "550.54.15"), (OPEN, "570.86.15")])
def test_nvidia_gpus_are_named_with_their_driver(tmp_path: Path, version: str, driver: str) -> None:
    shown(tmp_path / "nvidia", ["NVIDIA H200", "NVIDIA H200", "NVIDIA A100"], version)
    assert found(tmp_path) == (f"NVIDIA A100, driver {driver}", f"2 x NVIDIA H200, driver {driver}")


def test_where_the_kernel_hides_them_the_library_says_the_same(tmp_path: Path) -> None:
    names, nvml = ["NVIDIA H200", "NVIDIA H200"], Nvml(("NVIDIA H200", "NVIDIA H200"), "550.54.15")
    hidden = found(tmp_path, lambda _: nvml)
    shown(tmp_path / "nvidia", names, CLOSED)
    assert (found(tmp_path), nvml.open) == (hidden, 0)


@pytest.mark.parametrize(
    "fails", ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlSystemGetDriverVersion", "nvmlDeviceGetHandleByIndex_v2"]
)
def test_a_library_that_fails_names_nothing_and_is_left(tmp_path: Path, fails: str) -> None:
    nvml = Nvml(("NVIDIA H200",), "550.54.15", fails)
    assert (found(tmp_path, lambda _: nvml), nvml.open) == ((), 0)


def test_amd_gpus_have_llvms_names(tmp_path: Path) -> None:
    for number, version in enumerate((0, 90402, 90010, 110000)):
        node = tmp_path / "kfd" / str(number)
        node.mkdir(parents=True)
        (node / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\n")
    assert found(tmp_path) == ("AMD gfx1100", "AMD gfx90a", "AMD gfx942")
    (tmp_path / "amdgpu").write_text("6.7.0\n")
    assert found(tmp_path)[0] == "AMD gfx1100, driver 6.7.0"


def test_gpus_that_only_vulkan_knows_are_named_by_the_bus(tmp_path: Path) -> None:
    network, display = "0x020000", "0x030000"
    arc = (display, "0x8086", "0x56a0", "i915")
    on_bus(tmp_path, arc, (network, "0x8086", "0x1533", "igb"), arc, ("0x038000", "0x1002", "0x744c", ""))
    assert found(tmp_path) == ("AMD GPU 744c", "2 x Intel GPU 56a0, driver i915")


def test_gpus_of_a_maker_that_was_asked_are_not_named_again_and_virtual_displays_never(tmp_path: Path) -> None:
    shown(tmp_path / "nvidia", ["NVIDIA H200"], CLOSED)
    on_bus(tmp_path, ("0x030200", "0x10de", "0x2335", "nvidia"), ("0x030000", "0x1234", "0x1111", "bochs-drm"))
    assert found(tmp_path) == ("NVIDIA H200, driver 550.54.15",)


def test_another_gpu_or_major_driver_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    chips = []
    drivers = ("550.54.15", "550.90.07", "570.86.15")
    for there in ((), *((f"NVIDIA H200, driver {driver}",) for driver in drivers)):
        monkeypatch.setattr(host, "boards", lambda there=there: there)
        chips.append(host.machine.__wrapped__())
    assert chips[1].chip == f"NVIDIA H200, driver 550; {chips[0].chip}"
    assert chips[1] == chips[2]
    assert len({digest.of(machine) for machine in chips}) == 3
