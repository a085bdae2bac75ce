"""The times of a decode step's dispatches on a board, by the device's own clock.

Vulkan: IREE's runtime takes device timestamps around each dispatch. CUDA and HIP: IREE's runtime (3.13) has no such
profile, but PyTorch's profiler sees every kernel of its process, including IREE's; `scripts/torch_kernels.py` uses it
where this Python has PyTorch.
"""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from llmbuild.digest import plain
from llmbuild.process.child import NEUTRAL, Limits, environment, python, run
from llmbuild.profiler.operators import bare_name, decode_call, tool
from llmbuild.profiler.protocol import Subject
from llmbuild.spec.measurement import Operator
from llmbuild.spec.program import abi_from
from llmbuild.spec.variant import Failure
from llmbuild.system.strict_json import JsonObject

SECONDS = 0.3
"""Seconds of repeated steps under Vulkan."""
STEPS = 10
"""Number of profiled decode steps, after as many unprofiled ones."""


def board_operators(subject: Subject, script: Path, limits: Limits) -> tuple[Operator, ...] | Failure:
    """Return the operators of one decode step in the middle of the context, the costliest first.

    `script` is the path of `torch_kernels.py`.
    """
    return _by_timestamps(subject, limits) if subject.driver == "vulkan" else _by_torch(subject, script, limits)


def _by_timestamps(subject: Subject, limits: Limits) -> tuple[Operator, ...] | Failure:
    with TemporaryDirectory(prefix="llmbuild-") as name:
        archive, output = Path(name) / "parameters.irpa", Path(name) / "step.ireeprof"
        archive.symlink_to(subject.parameters_path.resolve())  # the tool takes the format from the file's suffix
        command = [
            str(tool()),
            f"--device={subject.driver}",
            *decode_call(subject.artifact_path, archive, abi_from(subject.abi)),
            f"--benchmark_min_time={SECONDS}s",
            "--device_profiling_mode=dispatch-events",
            f"--device_profiling_output={output}",
        ]
        failure = run(command, "profile", limits, output)
        if failure:
            return failure
        read = [str(tool("iree-profile")), "dispatch", "--format=jsonl", str(output)]
        try:
            done = subprocess.run(
                read,
                capture_output=True,
                text=True,
                check=False,
                timeout=limits.left_s(),
                env=environment(),
                cwd=NEUTRAL,
            )
        except subprocess.TimeoutExpired:
            return Failure("profile", f"iree-profile {limits.exceeded()}", " ".join(read), "", lasting=False)
        if done.returncode:
            return Failure("profile", done.stderr.strip()[-200:], " ".join(read), "", lasting=False)
        return read_profile(done.stdout.splitlines())


def read_profile(lines: Iterable[str]) -> tuple[Operator, ...]:
    """Return operators of one step from the groups of several steps in `iree-profile dispatch --format=jsonl`.

    The least frequent dispatch runs once per step: the token's embedding lookup and the argmax.
    """
    rows = [json.loads(line) for line in lines]
    groups = [r for r in rows if r.get("type") == "dispatch_group" and r.get("valid")]
    steps = min((r["valid"] for r in groups), default=1)
    return _sorted((r["key"], round(r["valid"] / steps), r["total_ns"] * 1e-9 / steps) for r in groups)


def _by_torch(subject: Subject, script: Path, limits: Limits) -> tuple[Operator, ...] | Failure:
    with TemporaryDirectory(prefix="llmbuild-") as name:
        request, output = Path(name) / "request.json", Path(name) / "operators.json"
        told = {k: str(v) if isinstance(v, Path) else plain(v) for k, v in vars(subject).items()}
        request.write_text(json.dumps({**told, "steps": STEPS, "output": str(output)}))
        command = python(str(script.absolute()), str(request))
        failure = run(command, "profile", limits, output)
        if failure:
            return failure
        body = json.loads(output.read_text())
    if "reason" in body:
        return Failure("profile", body["reason"], "", "", lasting=False)
    return read_kernels(body["kernels"], body["steps"])


def read_kernels(kernels: Iterable[JsonObject], steps: int) -> tuple[Operator, ...]:
    """Return operators of one step from kernels of several: their names, counts, and total seconds."""
    return _sorted((k["name"], round(k["count"] / steps), k["seconds"] / steps) for k in kernels)


def _sorted(rows: Iterable[tuple[str, int, float]]) -> tuple[Operator, ...]:
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for name, count, taken in rows:
        calls[bare_name(name)] += count
        seconds[bare_name(name)] += taken
    return tuple(sorted((Operator(n, calls[n], seconds[n]) for n in calls), key=lambda o: -o.seconds))
