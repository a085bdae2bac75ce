"""The IREE compiler of the installed wheel: its path, its version, and a call of it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from llmbuild.compiler import subgroups
from llmbuild.compiler.flags import compile_flags, target_flags
from llmbuild.errors import InputError
from llmbuild.process.child import NEUTRAL, Limits, environment, run
from llmbuild.spec.space import Value
from llmbuild.spec.target import CUDA, VULKAN, Target
from llmbuild.spec.variant import Failure

PROBE = """\
func.func @probe(%a: tensor<4xf32>) -> tensor<4xf32> {
  %0 = arith.addf %a, %a : tensor<4xf32>
  return %0 : tensor<4xf32>
}
"""

MATVEC = """\
func.func @probe(%a: tensor<256x512xf16>, %x: tensor<512xf16>) -> tensor<256xf32> {
  %zero = arith.constant 0.0 : f32
  %empty = tensor.empty() : tensor<256xf32>
  %filled = linalg.fill ins(%zero : f32) outs(%empty : tensor<256xf32>) -> tensor<256xf32>
  %out = linalg.generic {indexing_maps = [affine_map<(n, k) -> (n, k)>, affine_map<(n, k) -> (k)>,
      affine_map<(n, k) -> (n)>], iterator_types = ["parallel", "reduction"]}
      ins(%a, %x : tensor<256x512xf16>, tensor<512xf16>) outs(%filled : tensor<256xf32>) {
  ^bb0(%l: f16, %r: f16, %sum: f32):
    %wide = arith.extf %l : f16 to f32
    %also = arith.extf %r : f16 to f32
    %product = arith.mulf %wide, %also : f32
    %more = arith.addf %sum, %product : f32
    linalg.yield %more : f32
  } -> tensor<256xf32>
  return %out : tensor<256xf32>
}
"""
"""A matrix-vector product, the main operation of decoding, as a test program for code generation."""

CUDA_CHIPS = "sm_60 sm_61 sm_62 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_120 sm_121".split()
"""NVIDIA architectures that the compiler supports; it rejects another one only during code generation."""

SYSTEM_FEATURES = frozenset(
    "shstk pku mwaitx rdpru clzero wbnoinvd invpcid fsgsbase prefetchi rdpid rdrnd rdseed clflushopt clwb lwp xsave "
    "xsavec xsaveopt xsaves fxsr prfchw movdiri movdir64b sgx ptwrite cldemote waitpkg serialize uintr 64bit x87 mmx "
    "cx8 crc32 cmov pconfig tsxldtrk enqcmd hreset kl widekl invlpgb reserve-x18".split()
)
"""Features that generated tensor code never uses, or that every x86-64 host has; a loader need not check them."""


@cache
def binary(name: str = "iree-compile") -> Path:
    """Return the path of a tool of the installed compiler's wheel, without importing the compiler.

    Raises:
        InputError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("iree")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder).absolute() / "compiler" / "_mlir_libs" / name
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise InputError(f"{name} is not installed: pip install 'llmbuild[build]'")


def compiler_version() -> str:
    """Return the version of the installed compiler, `absent` without one."""
    try:
        return version("iree-base-compiler")
    except PackageNotFoundError:
        return "absent"


def compile_command(
    module: Path, output: Path, target: Target, point: Mapping[str, Value], tool: str = ""
) -> list[str]:
    """Return the whole command line, for a shell; with `tool` in place of the installed compiler."""
    return [tool or str(binary()), str(module.absolute()), *compile_flags(target, point), "-o", str(output)]


def compile_module(
    module: Path, output: Path, target: Target, point: Mapping[str, Value], limits: Limits
) -> Failure | None:
    """Compile MLIR to a `.vmfb` at `output`; None on success, else the failure."""
    return run(compile_command(module, output, target, point), "compile", limits, output)


@cache
def backends() -> tuple[str, ...]:
    """Return the names of the backends that the installed compiler was built with."""
    asked = [str(binary()), "--iree-hal-list-target-backends"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment(), cwd=NEUTRAL)
    return tuple(line.strip() for line in told.stdout.splitlines()[1:] if line.strip())


def check_known(target: Target) -> None:
    """Refuse a target that the installed compiler has no backend or no name for.

    Raises:
        InputError: with instructions.
    """
    if target.backend not in backends():
        there = ", ".join(backends()) or "none"
        raise InputError(
            f"target {target.name}: the installed compiler has no {target.backend} backend; it has {there}"
        )
    if target.backend == CUDA and not target.attribute and target.cpu not in CUDA_CHIPS:
        raise InputError(
            f"target {target.name}: the compiler has no name for {target.cpu}; it knows {', '.join(CUDA_CHIPS)}. "
            "Another chip needs an `attribute` that describes it, as targets/h200.yaml has"
        )


def probe(target: Target, point: Mapping[str, Value]) -> Failure | None:
    """Generate code for a matrix-vector product; None on success."""
    with TemporaryDirectory(prefix="llmbuild-") as folder:
        source = Path(folder) / "matvec.mlir"
        source.write_text(MATVEC)
        return compile_module(source, Path(folder) / "matvec.vmfb", target, point, Limits(seconds=60))


def resolve(target: Target) -> Target:
    """Return the target with the compiler's resolved CPU and features, or subgroup size; `host` is replaced.

    A Vulkan target requires the subgroup size that its code is generated for: another one gives wrong results.

    Raises:
        InputError: the compiler does not know this CPU, this GPU or these features.
    """
    check_known(target)
    with TemporaryDirectory(prefix="llmbuild-") as folder:
        source, output = Path(folder) / "probe.mlir", Path(folder) / "probe.out"
        source.write_text(PROBE)
        stop = "executable-sources" if target.is_cpu else "executable-configurations"
        command = [str(binary()), str(source), *target_flags(target), f"--compile-to={stop}"]
        failure = run([*command, "-o", str(output)], "compile", Limits(seconds=60), output)
        if failure:
            raise InputError(
                f"target {target.name}: the compiler does not take it: {failure.reason}\n{failure.command}"
            )
        text = output.read_text(errors="replace")
    if target.is_cpu:
        return _resolved(target, text)
    size = subgroups.size(text)
    required = {f"subgroup-size-{size}"} if size and target.backend == VULKAN else set()
    return replace(target, subgroup=size, requires=tuple(sorted({*target.requires, *required})))


def _resolved(target: Target, text: str) -> Target:
    cpu = re.search(r'\bcpu = "([^"]*)"', text)
    features = re.search(r'\bcpu_features = "([^"]*)"', text)
    if not cpu or not features:
        raise InputError(f"target {target.name}: the compiler names no CPU for it")
    last: dict[str, str] = {f[1:]: f[0] for f in features[1].split(",") if f}  # LLVM uses the last setting of a feature
    flagged = tuple(sorted(sign + name for name, sign in last.items()))
    needed = tuple(sorted(n for n, sign in last.items() if sign == "+" and n not in SYSTEM_FEATURES))
    return replace(target, cpu=cpu[1], features=flagged, requires=tuple(sorted({*needed, *target.requires})))
