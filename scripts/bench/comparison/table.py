"""From the participants' times to rows: medians, pairs, paired ratios, and the readable table."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from comparison.rounds import FIRST_PROMPT, Entrant
from llmbuild.digest import short
from llmbuild.profiler import statistics
from llmbuild.report.rows import quantity, table
from llmbuild.spec.measurement import Reading

OURS = "llmbuild"
STREAMING = "streaming"
"""Who only reads the bytes of our parameters: the fraction of its rate is what a decode step makes of the memory."""
SECONDS = ("load_s", "first_token_s", "prefill_s", "decode_s")
DECODE_PEER = {
    "int8": ("llama.cpp", "q8_0"),
    "int7": ("llama.cpp", "q8_0"),
    "int4": ("llama.cpp", "q4_0"),
    "f16": ("llama.cpp", "f16"),
    "bf16": ("llama.cpp", "f16"),
    "f12": ("llama.cpp", "f16"),
    "f32": ("torch", "float32"),
}
"""Whom a family of our weight formats meets at decoding and starting: the peer with weights of that size."""

PREFILL_PEER = ("openvino", "int8")
"""Whom all of ours meet at the prompt: the fastest known peer there."""

RATIOS = ("decode_s", "first_token_s", "prefill_s")
PeerOf = Callable[[str, str], tuple[str, str] | None]
"""Runtime and format of the peer that a weight format of ours is compared with in a metric."""


def peer_of(weight_format: str, metric: str) -> tuple[str, str] | None:
    """Return runtime and format of the peer that ours is compared with; None where there is no match."""
    return PREFILL_PEER if metric == "prefill_s" else DECODE_PEER.get(family(weight_format))


def family(weight_format: str) -> str:
    """Return what a weight format is but for its groups and zeros: `int4` of `int4_g128` and of `int4a_g64`."""
    found = re.match(r"[a-z]+\d+", weight_format)
    return found[0] if found else weight_format


def ratio(mine: Entrant, theirs: Entrant, metric: str) -> Reading | None:
    """Return ours over theirs, paired by round; None when no round has both."""
    a, b = mine.samples.get(metric, {}), theirs.samples.get(metric, {})
    both = sorted(a.keys() & b.keys())
    if not both:
        return None
    return statistics.paired_ratio([a[n] for n in both], [b[n] for n in both])


def ratios(mine: Entrant, everyone: Sequence[Entrant], peer: PeerOf = peer_of) -> dict[str, dict[str, Any]]:
    """Return, per metric, the peer and the paired ratio to it with its 95 % interval."""
    found: dict[str, dict[str, Any]] = {}
    if mine.participant.runtime != OURS:
        return found
    for metric in RATIOS:
        wanted = peer(mine.participant.format, metric)
        theirs = next((e for e in everyone if (e.participant.runtime, e.participant.format) == wanted), None)
        read = ratio(mine, theirs, metric) if theirs is not None else None
        if theirs is not None and read is not None:
            found[metric] = {
                "to": theirs.participant.name,
                "median": read.median,
                "low": read.low,
                "high": read.high,
                "rounds": len(read.samples),
            }
    return found


def streamed(mine: Entrant, everyone: Sequence[Entrant]) -> dict[str, Any] | None:
    """Return the part of the rate at which the same bytes can be read that decoding reaches, with its interval."""
    if mine.participant.runtime != OURS:
        return None
    wanted = (STREAMING, mine.participant.format)
    reader = next((e for e in everyone if (e.participant.runtime, e.participant.format) == wanted), None)
    read = ratio(reader, mine, "decode_s") if reader is not None else None
    return {"median": read.median, "low": read.low, "high": read.high} if read else None


def rows(everyone: Sequence[Entrant], peer: PeerOf = peer_of) -> list[dict[str, Any]]:
    """Return one row for each participant, the failed ones too: metrics in seconds and bytes, absent ones None."""
    return [_row(entrant, everyone, peer) for entrant in everyone]


def _row(entrant: Entrant, everyone: Sequence[Entrant], peer: PeerOf) -> dict[str, Any]:
    taken = {name: list(entrant.samples.get(name, {}).values()) for name in SECONDS}
    read = {name: statistics.median_of(values) for name, values in taken.items() if values}
    who = entrant.participant
    return {
        "participant": who.name,
        "runtime": who.runtime,
        "format": who.format,
        "version": entrant.version,
        "variant": who.variant or None,
        "choices": who.choices or None,
        "status": "absent" if who.absent else "failed" if entrant.reason else "measured",
        "reason": entrant.reason or None,
        **{name: read[name].median if name in read else None for name in SECONDS},
        "peak_memory_bytes": entrant.peak_memory_bytes,
        "intervals": {name: [r.low, r.high] for name, r in read.items()},
        "ratios": ratios(entrant, everyone, peer),
        "of_streaming": streamed(entrant, everyone),
        "samples": {**taken, "decode_steps_s": entrant.decode_steps_s},
    }


def text(found: Sequence[dict[str, Any]], prompt: int) -> str:
    """Return the table, with what is missing and why below it."""
    header = [
        "participant",
        "load",
        f"first of {min(FIRST_PROMPT, prompt)}",
        f"prefill {prompt}",
        "decode/token",
        "memory",
    ]
    header += ["of streaming", "decode vs peer", "first vs peer", "prefill vs peer"]
    lines = [
        [
            row["participant"],
            *(quantity(row[name], "s") for name in SECONDS),
            quantity(row["peak_memory_bytes"], "B"),
            interval(row["of_streaming"]),
            *(interval(row["ratios"].get(name)) for name in RATIOS),
        ]
        for row in found
    ]
    told = [f"{row['participant']}: {row['status']}: {row['reason']}" for row in found if row["reason"]]
    met = sorted({f"{OURS} {row['format']} meets {_met(row)}" for row in found if row["ratios"]})
    ours = [
        f"{row['participant']}: variant {short(row['variant'])}, {row['choices']}" for row in found if row["variant"]
    ]
    return "\n".join([table(header, lines), "", *ours, *met, *told])


def _met(row: dict[str, Any]) -> str:
    where = {"decode_s": "at decoding", "first_token_s": "at load and first token", "prefill_s": "at the prompt"}
    return ", ".join(f"{found['to']} {where[name]}" for name, found in row["ratios"].items())


def interval(found: dict[str, Any] | None) -> str:
    """Return a median with its 95 % interval; empty where there is none."""
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else ""
