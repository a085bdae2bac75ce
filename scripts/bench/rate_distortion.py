"""Bytes, speed and quality of every usable variant of a catalog, beside llama.cpp's ladder of formats on the same file.

    python scripts/bench/rate_distortion.py -C CATALOG [--recipe RECIPE] [--gguf FILE] [--ladder Q2_K ... Q8_0]
        [--importance] [--untimed] [--plot FILE] [--json]

llama.cpp makes each rung itself from the recipe's GGUF file, with its own settings; `as is` is the file. Where the
model is a folder of weights, llama.cpp's conversion makes the file, in f32. A rung names what most matrices have:
llama.cpp takes another format for those whose rows do not fit its blocks, and for some others, so the bytes are those
of the files. `+imatrix` is a rung that was made with an importance matrix from the recipe's calibration text, which
llmbuild's own calibration reads too. Speed is that of peers.py: running processes in interleaved rounds. KL divergence
and top-1 agreement are to the f32 model of the file's weights, on the recipe's held-out text: ours are the catalog's,
llama.cpp's are scored here on the same windows and reference logits. A row is on the front if no other is as good in
bytes, decoding time and KL and better in one of them; `of all` is the front of everyone, `of own` that of its runtime.
A variant whose prompt took longer than `--longest` when it was built is not run again: its times are the catalog's. A
second table has, for each of llama.cpp's rows, what of ours has no more KL in the fewest bytes: ours over theirs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
import real_model
from comparison import plot, setup, table
from comparison.rounds import Participant, compare
from comparison.script import end, say
from peer_worker import FILE_TYPES
from real_model import AS_IS, IMPORTANCE, PEER

from llmbuild.errors import InputError
from llmbuild.report import rows as shown
from llmbuild.report.rows import quantity
from llmbuild.runtime import host

LADDER = ("q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0")
WEIGHED = ("size_bytes", "decode_s", "quality_kl")
"""What a front is made of; less is better."""


def on_front(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether a row has all figures of `WEIGHED`, and no other is as good in all and better in one."""

    def beats(other: dict[str, Any]) -> bool:
        pairs = [(other[name], row[name]) for name in WEIGHED]
        return all(a is not None and a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return all(row[name] is not None for name in WEIGHED) and not any(beats(other) for other in rows)


def with_fronts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows from the smallest to the largest, each with the fronts that it is on."""
    found = []
    for row in sorted(rows, key=lambda row: (row["size_bytes"], row["participant"])):
        own = [other for other in rows if other["runtime"] == row["runtime"]]
        found.append({**row, "front_of_all": on_front(row, rows), "front_of_own": on_front(row, own)})
    return found


def matched(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each row of llama.cpp, what of ours has no more KL in the fewest bytes, and both ratios to it."""
    found = []
    ours = [row for row in rows if row["runtime"] != PEER and row["quality_kl"] is not None]
    for rung in rows:
        if rung["runtime"] != PEER or rung["quality_kl"] is None:
            continue
        as_good = [row for row in ours if row["quality_kl"] <= rung["quality_kl"]]
        best = min(as_good, key=lambda row: row["size_bytes"], default=None)
        times = best and best["decode_s"] and rung["decode_s"]
        found.append(
            {
                "rung": rung["participant"],
                "quality_kl": rung["quality_kl"],
                "ours": best and best["participant"],
                "ours_kl": best and best["quality_kl"],
                "bytes_ratio": best and best["size_bytes"] / rung["size_bytes"],
                "decode_ratio": best["decode_s"] / rung["decode_s"] if best and times else None,
            }
        )
    return found


def rungs(asked: argparse.Namespace, python: Path) -> list[Participant]:
    """Return llama.cpp on the file as it is and on each rung, which is made once."""
    kinds = [f"{kind}{end}" for end in ("", *([IMPORTANCE] if asked.importance else [])) for kind in asked.ladder]
    folder = str(real_model.peer_files(asked, python, kinds))
    opening = {"peer": PEER, "folder": folder, "threads": asked.threads, "positions": peers.positions(asked)}
    command = (str(python), str(setup.PEER_WORKER))
    return [
        Participant(
            f"{PEER} {kind.replace('_', ' ') if kind == AS_IS else kind}",
            PEER,
            kind,
            command,
            {**opening, "format": kind},
        )
        for kind in (AS_IS, *kinds)
    ]


def qualities(told: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a participant's quality, from its score or its row, and why it has no score."""
    names = ("quality_kl", "kl_error", "quality_top1")
    return {**{name: told.get(name) for name in names}, "not_scored": told.get("refused")}


TIMES = ("load_s", "decode_s", "prefill_s", "peak_memory_bytes")


def untimed(who: Participant, told: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a participant of which only bytes and quality are asked."""
    return {**recorded(who, {**dict.fromkeys(("tpot_s", "ttft_s", *TIMES)), **told}), "status": "measured"}


def recorded(who: Participant, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a variant that is not run again, with the times of the catalog."""
    return {
        "participant": who.name,
        "runtime": who.runtime,
        "format": who.format,
        "variant": who.variant,
        "choices": who.choices,
        "status": "recorded",
        "reason": None,
        "load_s": row["load_s"],
        "decode_s": row["tpot_s"],
        "prefill_s": row["ttft_s"],
        "peak_memory_bytes": row["peak_memory_bytes"],
        **qualities(row),
        "size_bytes": real_model.size_bytes(who),
    }


def document(asked: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return it as one document.

    Raises:
        InputError: llama.cpp is not there, or the catalog has no variant that runs here.
    """
    place = real_model.ready(asked)
    ours, reference = real_model.own_rows(asked), real_model.reference_of(asked)
    quality = {row["variant"]: row for row in ours}
    theirs = rungs(asked, place.python)
    scores = {}
    for who in theirs:
        say(f"scoring {who.name}")
        scores[who.name] = real_model.quality(who, reference)
    ready = setup.own_participants(asked.catalog, ours, asked.threads, everyone=True)
    if asked.untimed:
        told = {**scores, **{who.name: qualities(quality[who.variant]) for who in ready}}
        return _document(asked, "", [untimed(who, told[who.name]) for who in (*ready, *theirs)])
    entering = [who for who in ready if quality[who.variant]["ttft_s"] <= asked.longest]
    vocabulary = min(row["abi"]["vocabulary"] for row in ours)
    found, noisy = compare([*entering, *theirs], peers.plan(asked, vocabulary), say)
    rows = [recorded(who, quality[who.variant]) for who in ready if who not in entering]
    for entrant, timed in zip(found, table.rows(found, lambda *_: None), strict=True):
        who = entrant.participant
        told = quality[who.variant] if who.variant else scores[who.name]
        kept = {name: value for name, value in timed.items() if name not in ("ratios", "of_streaming")}
        rows.append({**kept, **qualities(told), "size_bytes": real_model.size_bytes(who)})
    return _document(asked, noisy, rows)


def _document(asked: argparse.Namespace, noisy: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    asked_for = {n: getattr(asked, n) for n in ("prompt", "decode", "threads", "rounds", "loads", "seed")}
    return {
        "machine": host.machine().describe(),
        "gguf": real_model.gguf_of(asked).name,
        **asked_for,
        "context": max(asked.prompt, asked.context),
        "noise": noisy,
        "rows": with_fronts(rows),
        "matched": matched(with_fronts(rows)),
    }


def text(made: dict[str, Any]) -> str:
    """Return the table, and what the names stand for."""
    header = ["participant", "bytes", "KL", "top-1", "decode", "prompt", "memory", "on the front", ""]
    lines = [
        [
            row["participant"],
            quantity(row["size_bytes"], "B"),
            "-" if row["quality_kl"] is None else f"{row['quality_kl']:.5f}",
            "-" if row["quality_top1"] is None else f"{row['quality_top1']:.2%}",
            *(quantity(row[name], "s") for name in ("decode_s", "prefill_s")),
            quantity(row["peak_memory_bytes"], "B"),
            "of all" if row["front_of_all"] else "of own" if row["front_of_own"] else "",
            "" if row["status"] == "measured" else row["status"],
        ]
        for row in made["rows"]
    ]
    ours = [f"{row['participant']}: {row['choices']}" for row in made["rows"] if row["variant"]]
    told = [f"{row['participant']}: {row['reason']}" for row in made["rows"] if row["reason"]]
    told += [f"{row['participant']} is not scored: {row['not_scored']}" for row in made["rows"] if row["not_scored"]]
    pairs = [
        [
            one["rung"],
            f"{one['quality_kl']:.5f}",
            one["ours"] or "-",
            *("-" if one[name] is None else f"{one[name]:.5f}" for name in ("ours_kl",)),
            *("-" if one[name] is None else f"{one[name]:.2f}" for name in ("bytes_ratio", "decode_ratio")),
        ]
        for one in made["matched"]
    ]
    equal = shown.table(["at the KL of", "KL", "fewest bytes of ours", "KL", "bytes", "decode"], pairs)
    return "\n".join([shown.table(header, lines), "", equal, "", *ours, *told])


def add_ladder(parser: argparse.ArgumentParser) -> None:
    """Add what `rungs` reads."""
    known = [kind for kind in FILE_TYPES if kind != "f16"]
    parser.add_argument(
        "--ladder", nargs="+", default=LADDER, type=str.lower, choices=known, help="llama.cpp's formats"
    )
    parser.add_argument(
        "--importance", action="store_true", help="each rung with an importance matrix too, from the calibration text"
    )


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real_model.add_files(parser)
    peers.add_shared(parser)
    add_ladder(parser)
    parser.add_argument(
        "--longest", type=float, default=1.0, help="seconds that a prompt of a variant run here may take"
    )
    parser.add_argument("--untimed", action="store_true", help="bytes and quality alone: nothing is timed")
    parser.add_argument("--plot", type=Path, help="write a plot, such as front.svg")
    return peers.checked(parser, words)


def main() -> None:
    """Print the table."""
    asked = options()
    asked.work = asked.work.absolute()
    if asked.plot and (why := plot.needs_matplotlib()):
        raise InputError(why)
    made = document(asked)
    if asked.plot:
        plot.write(made["rows"], f"{made['gguf']} on {made['machine']}", asked.plot)
    if asked.json:
        print(json.dumps(made))
        return
    print(
        f"{made['machine']}; {made['gguf']}, batch 1, {asked.threads} threads, {asked.rounds} rounds, "
        f"{asked.decode} tokens behind {made['context']}"
        if not asked.untimed
        else f"{made['machine']}; {made['gguf']}, bytes and quality alone"
    )
    print(text(made))
    if not asked.untimed:
        print(f"noisy machine: {made['noise']}" if made["noise"] else "the machine was quiet")


if __name__ == "__main__":
    end(main)
