"""Load curves of variants on this machine: measured in a fresh process, and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbuild import digest
from llmbuild.build.remeasure import subject_from
from llmbuild.catalog.names import Registered
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import InputError, LoadRefused, NothingUsable
from llmbuild.process.child import Limits, python, run
from llmbuild.profiler import load
from llmbuild.profiler.load import BUDGET_S, PROMPTS, Bounds, Measured
from llmbuild.runtime import host, reader
from llmbuild.runtime.choose import refusal
from llmbuild.runtime.model import host_facts, verify
from llmbuild.spec.load_curve import LOAD_PROTOCOL, LoadCurve, OwnTime, Work
from llmbuild.spec.program import Abi, abi_from, cache_bytes
from llmbuild.spec.rows import Row, present
from llmbuild.spec.target import target_from
from llmbuild.spec.variant import Failure, Toolchain
from llmbuild.system.extras import EXTRAS

SEQUENCES = 16
"""Sequences that decode in the largest step, unless others are asked for."""
_OWN_TIME, _SERVED_TIME = "llmbuild.serve.own_time", "llmbuild.serve.served_time"
_SERVED = 1 / 3
"""Part of the seconds of a curve that are spent beyond it on what a server takes besides the device."""
_CACHES = 0.5
"""Part of the available memory that the keys and values of a measurement may take."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """For how long each curve is measured, and up to how many sequences."""

    budget_s: float = BUDGET_S
    sequences: int = SEQUENCES


def front_of(folder: Path, model: str, target: str) -> list[str]:
    """Return the variants of a model's front that can be opened here, or those that are compiled where none was
    measured.

    Raises:
        InputError: there are none.
    """
    rows, facts = reader.variants(folder, model, target), host_facts()
    found = list(dict.fromkeys(row["variant"] for row in rows if not refusal(row, facts)))
    if not found:
        raise InputError(f"no variant of {model} on {target} can be opened here: `llmbuild build` makes them")
    return found


def measure_loads(folder: Path, variants: Sequence[str], asked: Asked, tell: Tell) -> list[LoadCurve]:
    """Measure and record the load curves of variants, given by (a part of) their digests.

    Raises:
        InputError: no such variant, or one whose calls answer several sequences together.
        LoadRefused: this host must not open it.
        NothingUsable: it does not run here.
    """
    rows = [_row(folder, name) for name in variants]
    own = _own_time()
    catalog = Catalog(folder)
    try:
        return [_measured(catalog, row, asked, own, tell) for row in rows]
    finally:
        catalog.close()


def _row(folder: Path, prefix: str) -> Row:
    """Return a row of a variant that may be served here."""
    row = reader.find_variant(folder, prefix)[0]
    name = digest.short(row["variant"])
    if why := refusal(row, host_facts()):
        raise LoadRefused(f"variant {name} {why}")
    verify(folder, row)
    abi = abi_from(present(row["abi"]))
    if abi.batch != 1:
        raise InputError(f"variant {name} answers {abi.batch} sequences in each call: it is not served")
    return row


def _measured(catalog: Catalog, row: Row, asked: Asked, own: dict[str, float], tell: Tell) -> LoadCurve:
    folder, name = catalog.folder, digest.short(row["variant"])
    checks, toolchain = _made_of(folder, row)
    machine = host.machine()
    known_as = catalog.machine_known_as(digest.of(machine))[0]
    registered = Registered(target_from(row["target_body"]), machine, toolchain, known_as)
    catalog.register(registered)
    subject = subject_from(folder, row, checks, target_from(row["target_body"]))
    bounds = bounds_of(row, asked)
    with catalog.measuring():
        held = host.conditions().slowed()
        found = load.measure(subject, bounds, asked.budget_s, Limits(), lambda text: tell(f"{name}: {text}"))
        if isinstance(found, Failure):
            catalog.record_failure(row["model"], row["variant"], found)
            raise NothingUsable(f"variant {name}: {found.stage}: {found.reason}")
        curve = _curve(row, found, bounds, registered.machine_digest, own, held)
        curve = _with_server(folder, row, curve, asked)
    catalog.record_load_curve(curve)
    tell(f"{name}: {told(curve)}")
    return curve


def _made_of(folder: Path, row: Row) -> tuple[str, Toolchain]:
    """Return the check data and the toolchain of a variant."""
    with reader.opened(folder) as connection:
        checks = connection.execute("SELECT checks FROM program WHERE digest = ?", (row["program"],)).fetchone()
        body = connection.execute("SELECT body FROM toolchain WHERE digest = ?", (row["toolchain"],)).fetchone()
    decoded = reader.decode({"notes": body["body"]})
    return checks["checks"], Toolchain(**present(decoded["notes"]))


def bounds_of(row: Row, asked: Asked) -> Bounds:
    """Return up to which steps a variant is measured, and for how many contexts there is memory."""
    abi = abi_from(present(row["abi"]))
    contexts = _contexts(abi, row, asked.sequences + 1)
    sequences = asked.sequences if abi.page else max(1, min(asked.sequences, contexts - 1))
    return Bounds(bool(abi.page), abi.context, sequences, min(abi.context, PROMPTS[-1]), contexts)


def _contexts(abi: Abi, row: Row, most: int) -> int:
    free = host.available_memory_bytes()
    if free is None:
        return most
    rest = free * _CACHES - (row.get("parameter_bytes") or 0)
    return max(1, min(most, int(rest / cache_bytes(abi))))


def _own_time() -> dict[str, float]:
    """Return the seconds of the engine itself.

    Raises:
        NothingUsable: they could not be measured.
    """
    with TemporaryDirectory(prefix="llmbuild-") as name:
        output = Path(name) / "own.json"
        failure = run(python(_OWN_TIME, str(output)), "profile", Limits(60.0), output)
        if failure is not None:
            raise NothingUsable(f"the engine's own time: {failure.reason}")
        found: dict[str, float] = json.loads(output.read_text())
        return found


def _curve(row: Row, found: Measured, bounds: Bounds, machine: str, own: dict[str, float], held: str) -> LoadCurve:
    driver, workers = str(row["point"]["driver"]), int(row["point"]["workers"])
    named = {"artifact": row["artifact"], "machine": machine, "protocol": LOAD_PROTOCOL}
    named |= {"driver": driver, "workers": workers}
    cores = host.cores() if host.cores() < host.machine_cores() else 0
    named |= {"cores": cores} if cores else {}
    return LoadCurve(
        key=digest.of(named),
        variant=row["variant"],
        artifact=present(row["artifact"]),
        machine=machine,
        driver=driver,
        workers=workers,
        context=bounds.context,
        decodes_most=max(cell.work.decodes for cell in found.cells if not cell.held_out),
        prompt_most=max(cell.work.tokens for cell in found.cells if not cell.held_out),
        fit=found.fit,
        cells=found.cells,
        error_p95=found.error_p95,
        turn_s=own["turn_s"],
        row_s=own["row_s"],
        notes={**found.notes, **({"held back": held} if held else {})},
        energy_source=found.energy_source,
        watts=found.watts,
        cores=cores,
    )


def _with_server(folder: Path, row: Row, curve: LoadCurve, asked: Asked) -> LoadCurve:
    """Return a curve with what a server takes besides the device, or with a note why that is not known."""
    missing = [name for name in EXTRAS["serve"] if find_spec(name) is None]
    if missing:
        return _noted(curve, f"not measured: it needs {', '.join(missing)}: pip install 'llmbuild[serve]'")
    sequences = str(curve.decodes_most)
    serve = ["serve", row["model"], "-C", str(folder.resolve()), "--variant", row["variant"], "--port", "0"]
    words = python("llmbuild", *serve, "--host", "127.0.0.1", "--max-sequences", sequences)
    with TemporaryDirectory(prefix="llmbuild-") as name:
        output = Path(name) / "served.json"
        given = (str(output), row["model"], sequences, str(curve.context), f"{asked.budget_s * _SERVED:g}")
        failure = run(python(_SERVED_TIME, *given, *words), "profile", Limits(600.0), output)
        if failure is not None:
            return _noted(curve, f"not measured: {failure.reason}")
        return replace(curve, served=own_time(curve, json.loads(output.read_text())))


def _noted(curve: LoadCurve, why: str) -> LoadCurve:
    return replace(curve, notes={**curve.notes, "http": why})


def own_time(curve: LoadCurve, seen: Mapping[str, Any]) -> OwnTime:
    """Return what a server takes by what its clients saw, and by its own sums of the device's seconds.

    Steps take the device's time, which may be longer than the curve says, and a rest for the step and each sequence in
    it, by least squares: at least what the engine takes of itself. Requests were asked after rests, so all of theirs is
    cold. Of what a request takes alone, no more than its CPU seconds stand in the way of others; the rest passes only
    where the server was idle.
    """
    steps, cold = seen["decodes"], seen["cold"]
    sequences = np.array([one["sequences"] for one in steps], np.float64)
    known = [
        curve.fit.seconds(Work(decodes=int(n), context=round(n * one["context"])))
        for n, one in zip(sequences, steps, strict=True)
    ]
    device, seconds = (np.array([one[name] for one in steps]) for name in ("device_s", "step_s"))
    step_s, row_s = _rest(sequences, seconds - device, 1 / seconds, curve)
    found = OwnTime(step_s, row_s, 0.0, 0.0, 0.0, float(np.median(device / known)), cold["factor"], cold["seconds"])
    requests = {name: value / cold["factor"] for name, value in seen["requests"].items() if name.endswith("_s")}
    step = requests["device_s"] + found.seconds(1)
    before = max(0.0, requests["ttft_s"] - step)
    busy = max(0.0, requests["server_cpu_s"] + requests["client_cpu_s"] - step)
    end_s = min(max(0.0, requests["end_s"]), busy)
    request_s = min(before, busy - end_s)
    return replace(found, request_s=request_s, end_s=end_s, wake_s=before - request_s)


def _rest(
    sequences: NDArray[np.float64], rest: NDArray[np.float64], weight: NDArray[np.float64], curve: LoadCurve
) -> tuple[float, float]:
    """Return the seconds for each step and for each sequence in it, neither below what the engine itself takes."""
    columns = np.stack([np.ones_like(sequences), sequences], 1)
    step_s, row_s = np.linalg.lstsq(columns * weight[:, None], rest * weight, rcond=None)[0]
    if row_s < curve.row_s:
        row_s = curve.row_s
        step_s = float(np.average(rest - row_s * sequences, weights=weight**2))
    elif step_s < curve.turn_s:
        step_s = curve.turn_s
        row_s = float(np.average((rest - step_s) / sequences, weights=(sequences * weight) ** 2))
    return max(curve.turn_s, float(step_s)), max(curve.row_s, float(row_s))


def told(curve: LoadCurve) -> str:
    """Return a curve in one line."""
    kinds = len(curve.cells) - curve.held_out
    most = f"up to {curve.decodes_most} sequences and {curve.prompt_most} tokens of prompts"
    line = f"{kinds} kinds of steps, {most}; error p95 {curve.error_p95:.1%} on {curve.held_out} others"
    if (own := curve.served) is not None:
        line += f"; a server's own {own.step_s * 1e6:.0f} us a step, {own.row_s * 1e6:.0f} us a sequence in it"
        line += f", {(own.request_s + own.end_s) * 1e6:.0f} us a request"
        line += f"; {own.speeds}" if own.speeds else ""
    return f"{line}; {why}: measure it again" if (why := curve.doubt) else line
