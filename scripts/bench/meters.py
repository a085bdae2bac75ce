"""The energy meters of this machine, their update intervals, the idle power, and the agreement of two meters.

    python scripts/bench/meters.py [--seconds 10] [--json]

No device setting is changed. The load is a loop of this process, or another running process: for a GPU, start its load
first. The counter and the polled power of a board are compared over the same window.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

from comparison.script import end

from llmbuild.profiler.meters import energy, estimate, nvml, rapl
from llmbuild.profiler.meters.meter import Absent, Counter, Energy, Meter, with_measured_step
from llmbuild.report.rows import table
from llmbuild.runtime import host

KINDS: dict[str, Callable[[], Meter | Absent]] = {
    "rapl": rapl.find,
    "nvml_counter": nvml.find_counter,
    "nvml_polled": nvml.find_polled,
}
POLL_S = 0.02


def wait(seconds: float) -> Callable[[Callable[[], None]], None]:
    """Return work that waits, and keeps its windows."""

    def work(keep: Callable[[], None]) -> None:
        end = monotonic() + seconds
        while monotonic() < end:
            sleep(POLL_S)
            keep()

    return work


def spin(seconds: float) -> Callable[[Callable[[], None]], None]:
    """Return work that keeps one core busy, and keeps its windows."""

    def work(keep: Callable[[], None]) -> None:
        end = monotonic() + seconds
        while monotonic() < end:
            sum(range(20000))
            keep()

    return work


def watts(meter: Meter, work: Callable[[Callable[[], None]], None]) -> float | str:
    """Return the mean power of a piece of work, or why there is none."""
    window = meter.window()
    work(window.keep)
    found = window.close()
    return found.watts if isinstance(found, Energy) else found.reason


def rows(seconds: float) -> list[dict[str, Any]]:
    """Return one row for each meter: step, idle power and power under load, or why it is absent."""
    kinds = {**KINDS, **({"model": estimate.find} if estimate.asked() else {})}
    out: list[dict[str, Any]] = []
    for name, find in kinds.items():
        found = find()
        if isinstance(found, Absent):
            out.append({"meter": name, "absent": found.reason})
            continue
        meter: Meter = with_measured_step(found) if isinstance(found, Counter) else found
        row = {"meter": name, "source": meter.source, "boundary": meter.boundary, "step_s": meter.step_s}
        idle, busy = watts(meter, wait(seconds)), watts(meter, spin(seconds))
        out.append({**row, "idle_w": idle, "busy_w": busy, "conditions": meter.conditions()})
    return out


def agreement(seconds: float) -> dict[str, Any]:
    """Return the polled joules over the counter's on one window, or why they cannot be compared."""
    counter, polled = nvml.find_counter(), nvml.find_polled()
    if isinstance(counter, Absent):
        return {"absent": counter.reason}
    if isinstance(polled, Absent):
        return {"absent": polled.reason}
    found = energy.compare(counter, polled, wait(seconds))
    if isinstance(found, Absent):
        return {"absent": found.reason}
    return {"counter_j": found.first.joules, "polled_j": found.second.joules, "ratio": found.ratio}


def text(document: dict[str, Any]) -> str:
    """Return the table for people."""

    def shown(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [
        [row["meter"], *(["-"] * 4), row["absent"]]
        if "absent" in row
        else [row["meter"], row["boundary"], *(shown(row[k]) for k in ("step_s", "idle_w", "busy_w")), ""]
        for row in document["meters"]
    ]
    found = document["agreement"]
    told = found.get("absent") or f"{found['ratio']:.3f} ({found['polled_j']:.1f} J over {found['counter_j']:.1f} J)"
    header = ["meter", "boundary", "step s", "idle W", "busy W", "absent because"]
    return "\n".join([document["machine"], table(header, lines, left=(0, 1, 5)), f"polled over counter: {told}"])


def main() -> int:
    """Print what is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = {"meters": rows(asked.seconds), "agreement": agreement(asked.seconds)}
    document = {"machine": host.machine().describe(), **found}
    print(json.dumps(document) if asked.json else text(document))
    return 0


if __name__ == "__main__":
    end(main)
