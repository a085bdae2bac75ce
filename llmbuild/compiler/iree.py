"""The IREE compiler of the installed wheel: where it is, what version, and one call of it."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from llmbuild.compiler.flags import compile_flags, target_flags
from llmbuild.errors import InputError
from llmbuild.process import Limits, run
from llmbuild.spec.space import Value
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Failure

PROBE = """\
func.func @probe(%a: tensor<4xf32>) -> tensor<4xf32> {
  %0 = arith.addf %a, %a : tensor<4xf32>
  return %0 : tensor<4xf32>
}
"""

SYSTEM_FEATURES = frozenset(
    "shstk pku mwaitx rdpru clzero wbnoinvd invpcid fsgsbase prefetchi rdpid rdrnd rdseed clflushopt clwb lwp xsave "
    "xsavec xsaveopt xsaves fxsr prfchw movdiri movdir64b sgx ptwrite cldemote waitpkg serialize uintr 64bit x87 mmx "
    "cx8 crc32 cmov enqcmd hreset kl widekl invlpgb reserve-x18".split()
)
"""Features that generated code for tensors never uses, or that every x86-64 host has; a loader need not check them."""


@cache
def binary() -> Path:
    """Return the path of iree-compile in the installed wheel, without importing the compiler.

    Raises:
        InputError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("iree")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "compiler" / "_mlir_libs" / "iree-compile"
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise InputError("iree-compile is not installed: pip install 'llmbuild[build]'")


def compiler_version() -> str:
    """Return the version of the installed compiler, `absent` without one."""
    try:
        return version("iree-base-compiler")
    except PackageNotFoundError:
        return "absent"


def compile_command(module: Path, output: Path, target: Target, point: Mapping[str, Value]) -> list[str]:
    """Return the whole command line, which can be pasted into a shell."""
    return [str(binary()), str(module), *compile_flags(target, point), "-o", str(output)]


def compile_module(
    module: Path, output: Path, target: Target, point: Mapping[str, Value], limits: Limits
) -> Failure | None:
    """Compile MLIR to a `.vmfb` at `output`; None when it is there, else the failure."""
    return run(compile_command(module, output, target, point), "compile", limits, output)


def resolve(target: Target) -> Target:
    """Return the target with the CPU and features that the compiler itself takes for it; no `host` stays.

    Raises:
        InputError: the compiler does not know this CPU or these features.
    """
    with TemporaryDirectory(prefix="llmbuild-") as folder:
        source, output = Path(folder) / "probe.mlir", Path(folder) / "probe.out"
        source.write_text(PROBE)
        command = [str(binary()), str(source), *target_flags(target), "--compile-to=executable-sources"]
        failure = run([*command, "-o", str(output)], "compile", Limits(seconds=60), output)
        if failure:
            raise InputError(
                f"target {target.name}: the compiler does not take it: {failure.reason}\n{failure.command}"
            )
        text = output.read_text(errors="replace")
    return _resolved(target, text)


def _resolved(target: Target, text: str) -> Target:
    cpu = re.search(r'\bcpu = "([^"]*)"', text)
    features = re.search(r'\bcpu_features = "([^"]*)"', text)
    if not cpu or not features:
        raise InputError(f"target {target.name}: the compiler names no CPU for it")
    last: dict[str, str] = {f[1:]: f[0] for f in features[1].split(",") if f}  # LLVM takes the last word on a feature
    flagged = tuple(sorted(sign + name for name, sign in last.items()))
    needed = tuple(sorted(n for n, sign in last.items() if sign == "+" and n not in SYSTEM_FEATURES))
    return replace(target, cpu=cpu[1], features=flagged, requires=tuple(sorted({*needed, *target.requires})))
