"""The times of a decode step's dispatches: IREE's own profile, on real weights, in the real order."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from llmbuild.errors import InputError
from llmbuild.process.child import Limits, run
from llmbuild.spec.measurement import Operator
from llmbuild.spec.program import DECODE, PARAMETER_SCOPE, Abi, TensorType
from llmbuild.spec.variant import Failure
from llmbuild.system.strict_json import JsonObject

_TYPES = {"float32": "f32", "float16": "f16", "int8": "i8", "int64": "i64"}
SECONDS = 0.05
"""Seconds of the repeated step."""


def tool(name: str = "iree-benchmark-module") -> Path:
    """Return the path of a tool of the runtime wheel.

    Raises:
        InputError: the wheel has none.
    """
    spec = importlib.util.find_spec("iree")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "_runtime_libs" / name
        if path.is_file():
            return path
    raise InputError(f"{name} is not installed: pip install iree-base-runtime")


def decode_operators(artifact: Path, parameters: Path, abi: Abi, limits: Limits) -> tuple[Operator, ...] | Failure:
    """Return the operators of one decode step in the middle of the context, the costliest first."""
    with TemporaryDirectory(prefix="llmbuild-") as name:
        folder = Path(name)
        archive, output = folder / "parameters.irpa", folder / "result.json"
        archive.symlink_to(parameters.resolve())  # the tool takes the format from the file's suffix
        command = [
            str(tool()),
            "--device=local-sync",
            *decode_call(artifact, archive, abi),
            "--dispatch_statistics=true",
            f"--benchmark_min_time={SECONDS}s",
            "--benchmark_out_format=json",
            f"--benchmark_out={output}",
        ]
        failure = run(command, "profile", limits, output)
        if failure:
            return failure
        return _read(json.loads(output.read_text())["benchmarks"])


def decode_call(artifact: Path, archive: Path, abi: Abi) -> list[str]:
    """Return the arguments with which IREE's tools call one decode step in the middle of the context."""
    return [
        f"--module={artifact}",
        f"--parameters={PARAMETER_SCOPE}={archive}",
        f"--function={DECODE}",
        f"--input={abi.batch}xi64=1",
        f"--input={abi.batch}xi64={abi.context // 2}",
        *[f"--input={_zeros(kind)}" for kind in abi.kv],
    ]


def bare_name(name: str) -> str:
    """Return a dispatch's name without its function and number: dispatches with equal names are one operator."""
    return re.sub(r"^(?:prefill|decode|score)(?:\$async)?_dispatch_\d+_", "", name)


def dispatches(operators: Sequence[Operator]) -> int:
    """Return the number of dispatches of a step."""
    return sum(o.calls for o in operators)


def _zeros(kind: TensorType) -> str:
    return "x".join([*(str(d) for d in kind.shape), _TYPES[kind.dtype]]) + "=0"


def _read(rows: Sequence[JsonObject]) -> tuple[Operator, ...]:
    found = []
    for row in rows:
        if "calls" not in row:
            continue
        scale = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}[row["time_unit"]]
        found.append(Operator(bare_name(row["name"].split("/", 1)[1]), round(row["calls"]), row["real_time"] * scale))
    return tuple(sorted(found, key=lambda o: -o.seconds))
