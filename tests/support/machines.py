"""Where the kernels of each instruction set are compiled for and run: on this CPU, or on an emulated aarch64."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.artifact import compile_file

EMULATOR = os.environ.get("LLMBUILD_AARCH64_RUN", "").split()
"""A command that runs an iree-run-module of aarch64 here, as `scripts/emulate_aarch64` prints it."""
HOST = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@dataclass(frozen=True)
class Machine:
    """The least CPU that has an instruction set: `feature` is Linux's name of what tells it from others."""

    feature: str
    cpu: str
    flags: tuple[str, ...] = ()
    emulated: bool = False

    @property
    def lacks(self) -> str:
        """Why nothing can run here; empty where it can."""
        if self.emulated:
            return "" if EMULATOR else "LLMBUILD_AARCH64_RUN names no emulator"
        return "" if self.feature in HOST else f"this CPU has no {self.feature}"

    def compile(self, source: Path, *flags: str) -> Path:
        """Compile MLIR; the artifact lies next to it."""
        return compile_file(
            source, source.with_suffix(".vmfb"), "--iree-opt-level=O2", *self.flags, *flags, cpu=self.cpu
        )

    def call_each(self, artifact: Path, calls: Sequence[Sequence[Any]], driver: str) -> list[tuple[Any, list[Any]]]:
        """Return the result of each call of `main` and its inputs after it.

        Where calls are emulated, one process makes them all, through `main_N`, which takes the inputs of N calls.
        """
        if not self.emulated:
            return [(made, after) for (made,), after in (self.call(artifact, inputs, 1, driver) for inputs in calls)]
        inputs = [part for call in calls for part in call]
        made = emulate(artifact, inputs, len(calls), f"--device={driver}", f"--function=main_{len(calls)}")
        return [(one, []) for one in made]

    def call(
        self, artifact: Path, inputs: Sequence[Any], outputs: int, driver: str, function: str = "main"
    ) -> tuple[list[Any], list[Any]]:
        """Return the results of a function and its inputs after the call; those of an emulated call are not known."""
        if self.emulated:
            return emulate(artifact, inputs, outputs, f"--device={driver}", f"--function={function}"), []
        import iree.runtime as rt

        module, device = rt.load_vm_flatbuffer_file(str(artifact), driver=driver), rt.get_device(driver)
        taken = [rt.asdevicearray(device, part) for part in inputs]
        made = module[function](*taken)
        made = [made] if outputs == 1 else made
        return [np.asarray(part) for part in made], [part.to_host() for part in taken]


def emulate(artifact: Path, inputs: Sequence[Any], outputs: int, *flags: str) -> list[Any]:
    """Return the results of a call under the emulator."""
    folder = artifact.parent
    command = [*EMULATOR, f"--module={artifact}", *flags]
    for i, part in enumerate(inputs):
        np.save(folder / f"in{i}.npy", part)
        command.append(f"--input=@{folder / f'in{i}.npy'}")
    names = [folder / f"out{i}.npy" for i in range(outputs)]
    done = subprocess.run(
        [*command, *(f"--output=@{name}" for name in names)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.load(name) for name in names]


def _aarch64(feature: str, features: str) -> Machine:
    triple = "--iree-llvmcpu-target-triple=aarch64-unknown-linux-gnu"
    flags = (triple, f"--iree-llvmcpu-target-cpu-features={features}")
    return Machine(feature, "generic", flags, emulated=feature not in HOST)


def _avxvnni() -> Machine:
    """AVX-512 VNNI runs the same operations, in another encoding, where AVX-VNNI is missing."""
    if "avx_vnni" in HOST:
        return Machine("avx_vnni", "x86-64-v3", ("--iree-llvmcpu-target-cpu-features=+avxvnni",))
    return Machine("avx512_vnni", "x86-64-v4", ("--iree-llvmcpu-target-cpu-features=+avx512vnni",))


MACHINES = {
    "avx512bf16": Machine("avx512_bf16", "x86-64-v4", ("--iree-llvmcpu-target-cpu-features=+avx512bf16",)),
    "avx512": Machine("avx512_vnni", "x86-64-v4", ("--iree-llvmcpu-target-cpu-features=+avx512vnni",)),
    "avxvnni": _avxvnni(),
    "avx2": Machine("avx2", "x86-64-v3"),
    "i8mm": _aarch64("i8mm", "+dotprod,+i8mm"),
    "dotprod": _aarch64("asimddp", "+dotprod"),
}
"""By the name of the instruction set."""
