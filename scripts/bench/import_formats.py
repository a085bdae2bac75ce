"""Time the import of a recipe's model in each weight format, and what calibration adds to it.

    python scripts/bench/import_formats.py [RECIPE] [--formats NAME...] [--ways WAY...] [--rounds N] [--json]

Each round has an empty catalog, whose first import, of f16, is not counted: it makes what all formats share, the
structure and the f32 model's own logits. Then each format is imported in each way, in random order: rounded to the
nearest (`rtn`), with scaled channels (`scaled`), with bits for each matrix (`allocated`), fitted by GPTQ (`gptq`), and
fitted with scaled channels (`gptq+scaled`). A way that a format cannot have is left out. Seconds are wall time of one
import after another in one build process, medians over the rounds; `added` is what a way takes beyond `rtn`, paired by
round.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from comparison.conversion import ROOT
from comparison.script import end, say
from import_worker import OWN

from llmbuild.build.jobs import jobs_of
from llmbuild.build.request import BuildRequest
from llmbuild.build.steps import Steps
from llmbuild.catalog.writer import Catalog
from llmbuild.report.rows import quantity, table
from llmbuild.runtime import host
from llmbuild.spec.formats import FLOATS, INTEGERS
from llmbuild.spec.variant import Failure

WAYS = {
    "rtn": {},
    "scaled": {"scaling": "activation"},
    "allocated": {"allocation": "sensitive"},
    "gptq": {"quantization": "gptq"},
    "gptq+scaled": {"quantization": "gptq", "scaling": "activation"},
}
"""Choices of an import, by what they are called here."""

PLAIN = "rtn"
FIRST = "f16"


@dataclass
class Timed:
    """One format in one way: seconds by round, the bytes of its archive, and why it has none."""

    format: str
    way: str
    seconds: dict[int, float] = field(default_factory=dict)
    stored_bytes: int | None = None
    reason: str = ""


def one_round(recipe: Path, number: int, entries: Sequence[Timed], seed: int) -> None:
    """Import all entries in one build process with an empty catalog, in random order."""
    with TemporaryDirectory(prefix="llmbuild-bench-") as name:
        (job_of,) = jobs_of(BuildRequest(recipes=(recipe,), catalog=Path(name)))
        job, catalog = job_of(), Catalog(Path(name))
        steps = Steps(job, catalog)
        try:
            steps.import_(job.space.complete({**OWN, "weight_format": FIRST}))
            for entry in random.Random(seed + number).sample(list(entries), len(entries)):
                say(f"round {number + 1}: {entry.format} {entry.way}")
                begin = monotonic()
                made = steps.import_(job.space.complete({**OWN, "weight_format": entry.format, **WAYS[entry.way]}))
                if isinstance(made, Failure):
                    entry.reason = made.reason
                    continue
                entry.seconds[number] = monotonic() - begin
                entry.stored_bytes = catalog.blobs.path(made.parameters).stat().st_size
        finally:
            steps.close()
            catalog.close()


def possible(recipe: Path, formats: Sequence[str], ways: Sequence[str]) -> Iterator[Timed]:
    """Yield each format in each way that the space of the recipe's model has for it."""
    with TemporaryDirectory(prefix="llmbuild-bench-") as name:
        (job_of,) = jobs_of(BuildRequest(recipes=(recipe,), catalog=Path(name)))
        space = job_of().space
    for form in formats:
        for way in ways:
            asked = {**OWN, "weight_format": form, **WAYS[way]}
            point = space.complete(asked)
            if all(point.get(knob) == value for knob, value in asked.items()):
                yield Timed(form, way)


def rows(entries: Sequence[Timed]) -> list[dict[str, Any]]:
    """Return what was timed."""
    plain = {entry.format: entry.seconds for entry in entries if entry.way == PLAIN}
    found = []
    for entry in entries:
        base = plain.get(entry.format, {})
        added = [entry.seconds[n] - base[n] for n in entry.seconds.keys() & base.keys()]
        found.append(
            {
                "format": entry.format,
                "way": entry.way,
                "import_s": median(entry.seconds.values()) if entry.seconds else None,
                "added_s": median(added) if added and entry.way != PLAIN else None,
                "samples_s": [entry.seconds[n] for n in sorted(entry.seconds)],
                "stored_bytes": entry.stored_bytes,
                "reason": entry.reason,
            }
        )
    return found


def text(made: dict[str, Any]) -> str:
    """Return the table."""
    lines = [
        [
            row["format"],
            row["way"],
            quantity(row["import_s"], "s"),
            quantity(row["added_s"], "s"),
            quantity(row["stored_bytes"], "B"),
            row["reason"],
        ]
        for row in made["rows"]
    ]
    head = f"{made['machine']}; {made['recipe']}, {made['rounds']} rounds, one import at a time"
    return "\n".join([head, table(["format", "way", "import", "added", "weights", ""], lines)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=ROOT / "recipes" / "smollm2-135m-instruct.yaml")
    usual, known = ["int8", "int6_g32", "int5_g32", "int4_g32"], [*FLOATS, *INTEGERS]
    parser.add_argument("--formats", nargs="+", default=usual, choices=known)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    entries = list(possible(asked.recipe, asked.formats, asked.ways))
    for number in range(asked.rounds):
        one_round(asked.recipe, number, entries, asked.seed)
    made = {
        "machine": host.machine().describe(),
        "recipe": asked.recipe.stem,
        "rounds": asked.rounds,
        "rows": rows(entries),
    }
    print(json.dumps(made) if asked.json else text(made))


if __name__ == "__main__":
    end(main)
