"""The compile in four phases, so that points that differ only in late phases share the early ones.

front       whole-program passes, to `executable-sources`: the long part that all points of one model share
configure   each dispatch gets its tile sizes, to `executable-configurations`: short; equal results mean equal artifacts
translate   each dispatch becomes a function of LLVM's, to `executable-targets`; many flags change nothing in it
emit        LLVM makes machine code of all of them and links it

The result is byte for byte that of one call with the same flags. The front half is kept as text with its locations
(without them names change), because its executable target is edited there: the compiler ignores the flags of the
executable target when it continues from a front half. Translated dispatches are kept as bytecode, which is read faster,
and become text only where attributes for LLVM are edited.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from llmbuild.compiler.calls import Call, Runner, here
from llmbuild.compiler.flags import Phase, attributes, point_flags, shared_flags, target_flags
from llmbuild.process.child import Limits
from llmbuild.spec.space import Value
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Failure

SOURCES = "executable-sources"
CONFIGURATIONS = "executable-configurations"
TRANSLATED = "executable-targets"
TOOL = "iree-compile"
_DATA_TILING = "data_tiling"


def front_flags(target: Target, point: Mapping[str, Value]) -> list[str]:
    """Return the flags the front half depends on: points that agree in them share it.

    With data tiling the shapes of packed tiles come from the executable target, so its flags belong to the front half.
    """
    phases = ("front", "target") if point.get(_DATA_TILING, "off") != "off" else ("front",)
    return [*target_flags(target), *point_flags(point, *phases), *shared_flags(target)]


def configure_flags(target: Target, point: Mapping[str, Value]) -> list[str]:
    """Return the flags that act between a front half and translated dispatches; the target's flags are edited in."""
    return [
        *target_flags(target),
        *point_flags(point, "front", "target", "configure", "translate"),
        *shared_flags(target),
    ]


def translate_flags(target: Target, point: Mapping[str, Value]) -> list[str]:
    """Return the flags that still act on configured dispatches."""
    return [*target_flags(target), *point_flags(point, "front", "translate"), *shared_flags(target)]


def emit_flags(target: Target, point: Mapping[str, Value]) -> list[str]:
    """Return the flags that still act on translated dispatches: both together decide the artifact."""
    return [*target_flags(target), *point_flags(point, "front"), *shared_flags(target)]


def front(
    module: Path,
    output: Path,
    statistics: Path,
    target: Target,
    point: Mapping[str, Value],
    limits: Limits,
    run: Runner = here,
) -> Failure | None:
    """Run the front half: text with locations at `output`, and its scheduling features as JSON at `statistics`."""
    told = ["--iree-scheduling-dump-statistics-format=json", f"--iree-scheduling-dump-statistics-file={statistics}"]
    stop = [f"--compile-to={SOURCES}", "--mlir-print-debuginfo"]
    flags = (*front_flags(target, point), *told, *stop)
    return run(Call(TOOL, module, flags, output, statistics), limits)


def configure(
    source: Path,
    output: Path,
    target: Target,
    point: Mapping[str, Value],
    limits: Limits,
    text: bool = False,
    run: Runner = here,
) -> Failure | None:
    """Configure each dispatch of a retargeted front half; bytecode, or `text` with locations."""
    form = "--mlir-print-debuginfo" if text else "--emit-mlir-bytecode"
    steps = [f"--compile-from={SOURCES}", f"--compile-to={CONFIGURATIONS}", form]
    return run(Call(TOOL, source, (*configure_flags(target, point), *steps), output), limits)


def translate(
    configured: Path,
    output: Path,
    target: Target,
    point: Mapping[str, Value],
    limits: Limits,
    run: Runner = here,
) -> Failure | None:
    """Translate configured dispatches to LLVM's form: bytecode."""
    steps = [f"--compile-from={CONFIGURATIONS}", f"--compile-to={TRANSLATED}", "--emit-mlir-bytecode"]
    return run(Call(TOOL, configured, (*translate_flags(target, point), *steps), output), limits)


def emit(
    translated: Path,
    output: Path,
    target: Target,
    point: Mapping[str, Value],
    limits: Limits,
    run: Runner = here,
) -> Failure | None:
    """Make machine code of translated dispatches: the `.vmfb` at `output`."""
    source = translated
    if attributes(point, "emit"):
        source = translated.with_suffix(".mlir")
        failure = run(Call("iree-opt", translated, ("--mlir-print-debuginfo",), source), limits)
        if failure:
            return failure
        source.write_text(retarget(source.read_text(), point, "emit"))
    flags = (*emit_flags(target, point), f"--compile-from={TRANSLATED}")
    return run(Call(TOOL, source, flags, output), limits)


def retarget(text: str, point: Mapping[str, Value], phase: Phase = "target") -> str:
    """Return a front half, or translated dispatches, with a phase's attributes in every executable target.

    Raises:
        ValueError: no executable target of the CPU is in the text.
    """
    for key, value in attributes(point, phase).items():
        said = _attribute(value)
        text, count = re.subn(rf'\b{key} = (?:true|false|\d+ : i64|"[^"]*")', f"{key} = {said}", text)
        if not count:
            text, count = re.subn(r'("llvm-cpu", "[a-z0-9_-]+", \{)', rf"\g<1>{key} = {said}, ", text)
        if not count:
            raise ValueError(f"no executable target to write {key} into")
    return text


def _attribute(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value} : i64" if isinstance(value, int) else f'"{value}"'


def features(statistics: Path) -> dict[str, object]:
    """Return the front half's scheduling: dispatches, executables, transient and constant bytes; empty if unknown."""
    try:
        told = json.loads(statistics.read_text())["stream-aggregate"]
        return {
            "dispatches": int(told["execution"]["dispatch-count"]),
            "executables": int(told["executable"]["executable-count"]),
            "transient_bytes": int(told["execution"]["transient-memory-size"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
