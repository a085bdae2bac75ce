"""Time the import of a shape in each weight format, in turn with llama.cpp's conversion and quantization of the same.

    python scripts/bench/imports.py [--recipes RECIPE...] [--baseline CHECKOUT] [--formats f16 int8 ...] [--json]

The weights are random ones of the shape in bf16, as real checkpoints have, written once. llmbuild is timed as its
users pay for it: one build process with an empty catalog, from its start to the end of the first import (`first`), and
on to the end of the next (`further`); each format is first once and further once in a round. llama.cpp is timed by its
own convert_hf_to_gguf.py, a process from start to end, and by llama_model_quantize, the call alone. `first` meets
conversion and quantization together (for f16 the conversion to it, where nothing is left to quantize), `further` the
quantization alone. f12_e4m7, which llama.cpp does not have, meets f16. The order is random in each round, files are in
the page cache, and nobody waits for a disk but llmbuild, which syncs what it stores.

Memory is that of the whole process tree: anonymous is what it must have, resident counts mapped files too. Ratios are
llmbuild's time over llama.cpp's, paired by round: below 1 llmbuild is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from comparison import conversion, setup
from comparison.conversion import FORMATS, ROOT, Imported
from comparison.script import end, say
from comparison.watched import TICK_S, needs_linux

from llmbuild.errors import InputError
from llmbuild.profiler import noise, statistics
from llmbuild.report.rows import quantity, table
from llmbuild.runtime import host
from llmbuild.spec.files.reader import read_recipe

PEER_OF = {"f16": "f16", "f12_e4m7": "f16", "int8": "q8_0", "int4_g64": "q4_0"}
"""What llama.cpp makes of the same weights in about the same size, by our format."""

SHAPES = ("smollm2-135m", "smollm2-360m")
OURS, BASELINE, PEER = "llmbuild", "baseline", "llama.cpp"


@dataclass
class Timed:
    """What one participant took for one format: samples by round, and peaks over the rounds."""

    participant: str
    format: str
    first_s: dict[int, float] = field(default_factory=dict)
    first_cpu_s: dict[int, float] = field(default_factory=dict)
    further_s: dict[int, float] = field(default_factory=dict)
    further_cpu_s: dict[int, float] = field(default_factory=dict)
    anonymous_bytes: int = 0
    resident_bytes: int = 0
    largest_process_bytes: int = 0
    stored_bytes: int = 0

    def had(self, anonymous: int, resident: int, largest: int, stored: int) -> None:
        """Keep peaks of memory, and the size of what was made."""
        self.anonymous_bytes, self.stored_bytes = max(self.anonymous_bytes, anonymous), stored
        self.resident_bytes = max(self.resident_bytes, resident)
        self.largest_process_bytes = max(self.largest_process_bytes, largest)

    def took(self, number: int, first: bool, wall: float, cpu: float) -> None:
        """Keep the seconds of a round; round 0 fills caches and is not kept."""
        if number:
            seconds, busy = (self.first_s, self.first_cpu_s) if first else (self.further_s, self.further_cpu_s)
            seconds[number], busy[number] = wall, cpu


class Rounds:
    """The participants of one shape."""

    def __init__(self, asked: argparse.Namespace, recipe: Path, place: setup.Environment, tree: Path):
        self.asked, self.place, self.tree, self.shape = asked, place, tree, recipe.stem
        self.weights = weights = conversion.weights_of(recipe, asked.work, asked.seed)
        context, file = read_recipe(recipe).context, asked.work / f"{weights.name}.yaml"
        self.recipe = conversion.recipe_for(weights, context, asked.formats, file)
        self.busy_s = 0.0
        self.timed: dict[tuple[str, str], Timed] = {}
        self.source = asked.work / f"{weights.name}-bf16.gguf"
        self._checkouts = {OURS: ROOT, **({BASELINE: asked.baseline} if asked.baseline else {})}

    def at(self, participant: str, form: str) -> Timed:
        """Return where a participant's samples of a format are kept."""
        return self.timed.setdefault((participant, form), Timed(participant, form))

    def run(self) -> None:
        """Run all rounds."""
        order = random.Random(self.asked.seed)
        self._convert(0)
        for number in range(self.asked.rounds + 1):
            acts = self._acts(number)
            for act in order.sample(acts, len(acts)) if number else acts:
                act()
            say(f"[{number}/{self.asked.rounds}] rounds of {self.shape}")
        self.source.unlink(missing_ok=True)

    def _acts(self, number: int) -> list[Callable[[], None]]:
        formats = self.asked.formats if number else self.asked.formats[:1]
        wanted = sorted({PEER_OF[form] for form in formats})
        ours = [
            lambda who=who, form=form: self._import(number, who, form) for who in self._checkouts for form in formats
        ]
        theirs = [lambda kind=kind: self._quantize(number, kind) for kind in wanted]
        conversions = [lambda: self._convert(number)] if number else []
        directly = [lambda: self._convert_directly(number)] if "f16" in wanted else []
        return [*ours, *theirs, *conversions, *directly]

    def _import(self, number: int, who: str, form: str) -> None:
        formats = self.asked.formats
        following = formats[(formats.index(form) + 1) % len(formats)]
        pair = [form, following] if following != form else [form]
        for made in conversion.imported(self._checkouts[who], self.recipe, pair):
            self._keep(number, who, made)

    def _keep(self, number: int, who: str, made: Imported) -> None:
        self.busy_s += made.cpu_s
        timed = self.at(who, made.format)
        timed.took(number, made.first, made.wall_s, made.cpu_s)
        timed.had(made.anonymous_bytes, made.resident_bytes, made.largest_process_bytes, made.stored_bytes)

    def _convert(self, number: int) -> None:
        """Convert to what is quantized; the file of an earlier round stays in place until then."""
        self._converted(number, "bf16").rename(self.source)

    def _convert_directly(self, number: int) -> None:
        self._converted(number, "f16").unlink()

    def _converted(self, number: int, kind: str) -> Path:
        out: Path = self.source.with_suffix(f".{kind}.new.gguf")
        ran = conversion.converted(self.place.python, self.tree, self.weights, out, kind)
        self.busy_s += ran.cpu_s
        timed = self.at(PEER, kind)
        timed.took(number, True, ran.wall_s, ran.cpu_s)
        timed.had(ran.peak().anonymous, ran.peak().resident, ran.largest_bytes, out.stat().st_size)
        return out

    def _quantize(self, number: int, kind: str) -> None:
        out = self.source.with_suffix(f".{kind}.made.gguf")
        told, ran = conversion.quantized(self.place.python, self.source, out, kind, self.asked.threads)
        out.unlink()
        self.busy_s += ran.cpu_s
        timed = self.at(PEER, kind)
        timed.took(number, False, told["seconds"], told["cpu_s"])
        timed.had(ran.peak().anonymous, ran.peak().resident, ran.largest_bytes, told["bytes"])

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each participant and format."""
        order = (OURS, BASELINE, PEER)
        return [self._row(t) for t in sorted(self.timed.values(), key=lambda t: (order.index(t.participant), t.format))]

    def _row(self, timed: Timed) -> dict[str, Any]:
        kinds = ("first_s", "first_cpu_s", "further_s", "further_cpu_s")
        samples = {kind: list(getattr(timed, kind).values()) for kind in kinds}
        reads = {kind: statistics.median_of(values) for kind, values in samples.items() if values}
        sizes = {name: value for name, value in asdict(timed).items() if name.endswith("_bytes")}
        return {
            "shape": self.shape,
            "participant": timed.participant,
            "format": timed.format,
            **{kind: reads[kind].median if kind in reads else None for kind in kinds},
            "spread": {kind: [min(values), max(values)] for kind, values in samples.items() if values},
            **sizes,
            "ratios": self._ratios(timed),
            "samples": samples,
        }

    def _ratios(self, timed: Timed) -> dict[str, Any]:
        """Return ours over theirs, and ours over the baseline's."""
        if timed.participant == PEER:
            return {}
        found = {}
        for kind, theirs in self._peers_s(timed.format).items():
            found[f"{kind} to {PEER}"] = _ratio(getattr(timed, f"{kind}_s"), theirs)
            before = self.timed.get((BASELINE, timed.format))
            if before is not None and timed.participant == OURS:
                found[f"{kind} to {BASELINE}"] = _ratio(getattr(timed, f"{kind}_s"), getattr(before, f"{kind}_s"))
        return {name: ratio for name, ratio in found.items() if ratio}

    def _peers_s(self, form: str) -> dict[str, dict[int, float]]:
        """Return llama.cpp's seconds by round: for a first format, and for a further one."""
        kind = PEER_OF[form]
        quantization = self.at(PEER, kind).further_s
        conversion_s = self.at(PEER, "bf16").first_s
        both = {n: conversion_s[n] + quantization[n] for n in conversion_s.keys() & quantization.keys()}
        return {"first": self.at(PEER, "f16").first_s if kind == "f16" else both, "further": quantization}


def _ratio(mine: dict[int, float], theirs: dict[int, float]) -> dict[str, float] | None:
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return None
    read = statistics.paired_ratio([mine[n] for n in both], [theirs[n] for n in both])
    return {"median": read.median, "least": min(read.samples), "most": max(read.samples)}


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table."""
    header = ["shape", "participant", "format", "first", "cpu", "further", "cpu", "anonymous", "resident"]
    header += ["largest process", "stored", "first to llama.cpp", "further to llama.cpp", "first to baseline"]
    header += ["further to baseline"]
    ratios = [f"{kind} to {who}" for who in (PEER, BASELINE) for kind in ("first", "further")]
    lines = [
        [
            *(row[name] for name in ("shape", "participant", "format")),
            *(_seconds(row, name) for name in ("first_s", "first_cpu_s", "further_s", "further_cpu_s")),
            *(quantity(row[f"{n}_bytes"], "B") for n in ("anonymous", "resident", "largest_process", "stored")),
            *(_spread(row["ratios"].get(name)) for name in ratios),
        ]
        for row in rows
    ]
    kept = [n for n, name in enumerate(header) if BASELINE not in name or any(line[n] for line in lines)]
    return table([header[n] for n in kept], [[line[n] for n in kept] for line in lines], left=(0, 1, 2))


def _seconds(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return ""
    low, high = row["spread"][name]
    return f"{row[name]:.2f} [{low:.2f}, {high:.2f}]"


def _spread(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} [{found['least']:.2f}, {found['most']:.2f}]" if found else ""


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [ROOT / "recipes" / f"{name}.yaml" for name in SHAPES]
    parser.add_argument("--recipes", nargs="+", type=Path, default=shapes, help="recipes whose models are imported")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="of our kernels' weights")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="another checkout, timed in the same rounds")
    parser.add_argument("--environment", type=Path, help="one that has the peers, instead of .peers/; left as it is")
    parser.add_argument("--work", type=Path, default=ROOT / ".peers" / "imports", help="folder of the weights")
    parser.add_argument("--threads", type=int, default=host.cores(), help="of llama.cpp's quantization")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    found = parser.parse_args(words)
    if found.rounds < 1 or found.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    return found


def report(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds of all shapes and return them as one document."""
    if why := needs_linux():
        raise InputError(why)
    if asked.baseline and not (asked.baseline / "llmbuild").is_dir():
        raise InputError(f"{asked.baseline}: no checkout of llmbuild")
    asked.work = asked.work.absolute()
    asked.work.mkdir(parents=True, exist_ok=True)
    own = asked.environment is None
    place = setup.environment((asked.environment or ROOT / ".peers").absolute(), own, [PEER], say)
    if PEER in place.reasons:
        raise InputError(f"{PEER}: {place.reasons[PEER]}")
    tree = conversion.converter(place, own, say)
    before, rows, busy_s = noise.snapshot(), [], 0.0
    for recipe in asked.recipes:
        rounds = Rounds(asked, recipe, place, tree)
        rounds.run()
        rows += rounds.rows()
        busy_s += rounds.busy_s
    asked_for = {n: getattr(asked, n) for n in ("formats", "rounds", "threads", "seed")}
    own_ticks = noise.cpu_ticks([os.getpid()]) + round(busy_s / TICK_S)
    disturbed = noise.verdict(before, noise.snapshot(), asked.threads, own_ticks)
    return {"machine": host.machine().describe(), "weights": "bf16", **asked_for, "noise": disturbed, "rows": rows}


def main() -> int:
    """Print the table."""
    asked = options()
    made = report(asked)
    if asked.json:
        print(json.dumps(made))
        return 0
    print(f"{made['machine']}; weights in bf16, page cache warm, {asked.threads} threads, {asked.rounds} rounds")
    print(text(made["rows"]))
    print(
        "seconds and ratios are medians with the least and the most of all rounds; ratios below 1: llmbuild is faster"
    )
    print(f"noisy machine: {made['noise']}" if made["noise"] else "the machine was quiet")
    return 0


if __name__ == "__main__":
    end(main)
