"""From a target and a point to the flags of iree-compile; the only place that knows a flag's name."""

from __future__ import annotations

from collections.abc import Mapping

from llmbuild.spec.space import Value
from llmbuild.spec.target import HOST, Target

TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}

HYGIENE = (
    "--iree-llvmcpu-debug-symbols=false",
    "--iree-hal-executable-debug-level=0",
    "--iree-vm-bytecode-module-strip-source-map=true",
    "--iree-vm-emit-polyglot-zip=false",
)
"""Flags that keep file names and debug data out of the artifact, so that equal code has equal bytes."""

_DATA_TILING = {
    "off": (),
    "dispatch": ("--iree-opt-data-tiling=true",),
    "global": ("--iree-global-opt-data-tiling=true",),
}


def target_flags(target: Target) -> list[str]:
    """Return the flags that name the hardware."""
    flags = [
        "--iree-hal-target-device=local",
        f"--iree-hal-local-target-device-backends={target.backend}",
        f"--iree-llvmcpu-target-cpu={target.cpu}",
    ]
    if target.cpu != HOST:
        flags.append(f"--iree-llvmcpu-target-triple={TRIPLES[target.arch]}")
    if target.features:
        flags.append(f"--iree-llvmcpu-target-cpu-features={','.join(target.features)}")
    return flags


def point_flags(point: Mapping[str, Value]) -> list[str]:
    """Return the flags of the codegen level of a point; a knob at the compiler's default adds none.

    Only what differs from the compiler's own default is said, so that point 0 is what a plain call would do.
    """
    flags: list[str] = []
    if point["opt_level"] != "O0":
        flags.append(f"--iree-opt-level={point['opt_level']}")
    flags += _DATA_TILING[str(point["data_tiling"])]
    if point["split_reduction"]:
        flags.append("--iree-dispatch-creation-enable-split-reduction=true")
    if point["distribution_size"] != 64:
        flags.append(f"--iree-llvmcpu-distribution-size={point['distribution_size']}")
    return flags


def compile_flags(target: Target, point: Mapping[str, Value]) -> list[str]:
    """Return every flag but the file names."""
    return [*target_flags(target), *point_flags(point), *HYGIENE]
