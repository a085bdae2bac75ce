"""Measure the limits of this machine, and the shares of them that a catalog's variants reach.

    python scripts/bench/roofline.py [-C CATALOG [--model MODEL]] [--seconds S] [--mib N] [--json]

Three limits, with one worker and with all cores: bytes read per second over a buffer much larger than the caches, and
multiplications plus additions per second on f32 and on int8. Decoding is compared with the first: weights and cache
are read once for each token. A prompt is compared with the others: every weight is multiplied with every token, the
output matrix with the last only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from comparison.here import compile_here
from comparison.script import end

from llmbuild.digest import short
from llmbuild.errors import InputError
from llmbuild.profiler import roofline
from llmbuild.report.rows import differences, quantity, table
from llmbuild.runtime import host, reader
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.measurement import Reading
from llmbuild.spec.program import abi_from
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload

ROOT = Path(__file__).parent.parent.parent


def plain(reading: Reading | None) -> dict[str, float] | None:
    """Return a reading for JSON, without its samples."""
    return None if reading is None else {"median": reading.median, "low": reading.low, "high": reading.high}


def limit_rows(found: roofline.Roofline) -> list[dict[str, Any]]:
    """Return one row for each number of workers."""
    return [
        {
            "workers": rates.workers,
            "read_bytes_per_s": plain(rates.read_bytes_per_s),
            "f32_flop_per_s": plain(rates.f32_flop_per_s),
            "int8_op_per_s": plain(rates.int8_op_per_s),
        }
        for rates in dict.fromkeys((found.one, found.all))
    ]


def head_parameters(model: str) -> int:
    """Return the weights of a model's output matrix, from the recipe of its name; 0 where there is none."""
    recipe = ROOT / "recipes" / f"{model}.yaml"
    config = Path(read_recipe(recipe).model.location) / "config.json" if recipe.is_file() else recipe
    if not config.is_file():
        return 0
    shape = json.loads(config.read_text())
    return int(shape["vocab_size"]) * int(shape["hidden_size"])


def workloads(catalog: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the measurement of each (variant, workload) on this machine, the newest one: intervals and workload."""
    with reader.opened(catalog) as connection:
        rows = [reader.decode(r) for r in connection.execute("SELECT * FROM measurements ORDER BY created_at")]
    return {(row["variant"], row["workload"]): row for row in rows}


def variant_rows(found: roofline.Roofline, catalog: Path, model: str | None) -> list[dict[str, Any]]:
    """Return what each measured variant of this machine reaches, the best at decoding first.

    Raises:
        InputError: the catalog has none.
    """
    known, name = workloads(catalog), host.machine().describe()
    rows = [
        row
        for row in reader.variants(catalog, model, everything=True)
        if row["tpot_s"] and row["ttft_s"] and row["machine"] == name and (row["variant"], row["workload"]) in known
    ]
    if not rows:
        raise InputError(f"{catalog} has no variant{f' of {model}' if model else ''} that was measured on this machine")
    made = [_variant(found, row, known[row["variant"], row["workload"]]) for row in rows]
    return sorted(made, key=lambda row: (row["model"], row["workload"], row["tpot_s"]))


def _variant(found: roofline.Roofline, row: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    def read(metric: str) -> Reading:
        low, high = (measured["intervals"] or {}).get(metric) or (row[metric], row[metric])
        return Reading(row[metric], low, high, ())

    point, asked = row["point"], Workload(**measured["workload_body"])
    rates = found.of(str(point["driver"]), int(point["workers"]))
    done = roofline.work(abi_from(row["abi"]), row["parameter_bytes"], asked, head_parameters(row["model"]))
    reached = roofline.fractions(rates, done, read("tpot_s"), read("ttft_s"))
    return {
        "variant": row["variant"],
        "model": row["model"],
        "workload": row["workload"],
        "choices": differences(row),
        "workers": rates.workers,
        "tpot_s": row["tpot_s"],
        "ttft_s": row["ttft_s"],
        "bytes_per_token": done.parameter_bytes + done.kv_bytes,
        "prefill_operations": done.prefill_operations,
        "decode_of_bandwidth": plain(reached.decode_of_bandwidth),
        "prefill_of_f32": plain(reached.prefill_of_f32),
        "prefill_of_int8": plain(reached.prefill_of_int8),
    }


def text(document: dict[str, Any]) -> str:
    """Return the tables for people."""

    def rate(found: dict[str, float] | None) -> str:
        return "-" if found is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(x / 1e9 for x in found.values()))

    def share(found: dict[str, float] | None) -> str:
        return "-" if found is None else "{:.0%} [{:.0%}, {:.0%}]".format(*found.values())

    header = ["workers", "read GB/s", "f32 GFLOP/s", "int8 GOP/s"]
    limits = [
        [str(row["workers"]), *(rate(row[k]) for k in ("read_bytes_per_s", "f32_flop_per_s", "int8_op_per_s"))]
        for row in document["limits"]
    ]
    parts = [f"{document['machine']}; {document['buffer_bytes'] / 2**20:.0f} MiB read", table(header, limits)]
    if document["variants"]:
        header = [
            "variant",
            "model",
            "workers",
            "tpot",
            "of bandwidth",
            "ttft",
            "of f32 peak",
            "of int8 peak",
            "choices",
        ]
        lines = [
            [
                short(row["variant"]),
                row["model"],
                str(row["workers"]),
                quantity(row["tpot_s"], "s"),
                share(row["decode_of_bandwidth"]),
                quantity(row["ttft_s"], "s"),
                share(row["prefill_of_f32"]),
                share(row["prefill_of_int8"]),
                row["choices"],
            ]
            for row in document["variants"]
        ]
        parts += ["", table(header, lines, left=(0, 1, 8))]
    return "\n".join([*parts, *document["notes"]])


def main() -> int:
    """Print limits and, with a catalog, variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-C", "--catalog", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    parser.add_argument("--mib", type=int, default=0, help="of the buffer that is read; 8 last-level caches without")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    piece = 512 * host.cores()
    found = roofline.measure(compile_here, asked.seconds, -(-(asked.mib << 20) // piece) * piece)
    if isinstance(found, Failure):
        print(f"error: {found.stage}: {found.reason}\n{found.command}", file=sys.stderr)
        return 1
    document = {
        "machine": host.machine().describe(),
        "buffer_bytes": found.buffer_bytes,
        "limits": limit_rows(found),
        "variants": variant_rows(found, asked.catalog, asked.model) if asked.catalog else [],
        "notes": list(found.notes),
    }
    print(json.dumps(document) if asked.json else text(document))
    return 0


if __name__ == "__main__":
    end(main)
