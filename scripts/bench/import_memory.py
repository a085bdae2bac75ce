"""The peak memory of an import, by shape and weight format, held against what one tensor at a time may take.

    python scripts/bench/import_memory.py [--recipes RECIPE...] [--large] [--formats int8 f16 ...] [--json]

The bound is the largest tensor in f32, what is stored of it, and 1.5 GB for everything else: it does not grow with the
number of layers. Held against it is the anonymous memory of the whole process tree, looked at every 20 ms; resident
memory counts mapped files too, and `largest process` is VmHWM of the process that had the most. The import begins as a
build process with an empty catalog. Models are the recipes' own, or random weights in bf16, written once. Ends with 1
if an import is not within its bound.
"""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

from comparison import checkpoint, conversion
from comparison.conversion import FORMATS, ROOT
from comparison.script import end, say
from comparison.watched import STEP_S, needs_linux

from llmbuild.errors import InputError
from llmbuild.report.rows import quantity, table
from llmbuild.runtime import host
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.formats import bits

SHAPES = ("pystdlib", "smollm2-135m", "smollm2-360m", "qwen2.5-0.5b", "llama-3.2-1b")
LARGE = "llama-3.1-8b"
REST_BYTES = 1_500_000_000
"""For Python, the libraries, the program and buffers."""


def largest(weights: Path) -> tuple[str, int]:
    """Return name and number of values of a model's largest tensor."""
    shapes = checkpoint.shapes(json.loads((weights / "config.json").read_text()))
    return max(((name, prod(shape)) for name, shape in shapes.items()), key=lambda each: each[1])


def bound_bytes(count: int, form: str) -> int:
    """Return what an import may take whose largest tensor has `count` values."""
    return count * 4 + int(count * bits(form) / 8) + REST_BYTES


def row(checkout: Path, recipe: Path, form: str, work: Path) -> dict[str, Any]:
    """Import once and return its row."""
    weights = conversion.weights_of(recipe, work)
    file = conversion.recipe_for(weights, read_recipe(recipe).context, [form], work / f"{weights.name}.yaml")
    (made,) = conversion.imported(checkout, file, [form])
    name, count = largest(weights)
    bound = bound_bytes(count, form)
    return {
        "shape": recipe.stem,
        "format": form,
        "largest_tensor": name,
        "largest_tensor_bytes": count * 4,
        "bound_bytes": bound,
        "anonymous_bytes": made.anonymous_bytes,
        "resident_bytes": made.resident_bytes,
        "largest_process_bytes": made.largest_process_bytes,
        "stored_bytes": made.stored_bytes,
        "seconds": made.wall_s,
        "within": made.anonymous_bytes <= bound,
    }


def text(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    sizes = ("largest_tensor", "bound", "anonymous", "resident", "largest_process", "stored")
    header = ["shape", "format", "largest in f32", "bound", "anonymous", "resident", "largest process", "stored"]
    lines = [
        [
            *(row["shape"], row["format"]),
            *(quantity(row[f"{n}_bytes"], "B") for n in sizes),
            quantity(row["seconds"], "s"),
            "yes" if row["within"] else "no",
        ]
        for row in rows
    ]
    return table([*header, "import", "within"], lines, left=(0, 1))


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [ROOT / "recipes" / f"{name}.yaml" for name in SHAPES]
    parser.add_argument("--recipes", nargs="+", type=Path, default=shapes, help="recipes whose models are imported")
    parser.add_argument("--large", action="store_true", help=f"{LARGE} too: 16 GB of weights are written")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="of our kernels' weights")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose llmbuild imports; default: this one's")
    parser.add_argument("--work", type=Path, default=ROOT / ".peers" / "imports", help="folder of the weights")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def main() -> int:
    """Print one row for each shape and format."""
    asked = options()
    if why := needs_linux():
        raise InputError(why)
    work, rows = asked.work.absolute(), []
    work.mkdir(parents=True, exist_ok=True)
    for recipe in [*asked.recipes, *([ROOT / "recipes" / f"{LARGE}.yaml"] if asked.large else [])]:
        for form in asked.formats:
            rows.append(row(asked.checkout, recipe, form, work))
            say(f"{recipe.stem} {form}: {quantity(rows[-1]['anonymous_bytes'], 'B')}")
    if asked.json:
        print(json.dumps({"machine": host.machine().describe(), "step_s": STEP_S, "rows": rows}))
    else:
        print(f"{host.machine().describe()}; the process tree, every {STEP_S * 1e3:.0f} ms; weights in bf16")
        print(text(rows))
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    end(main)
