"""The rate at which our CPU kernels multiply rows by an output matrix, beside another checkout's or a loop that reads.

    python scripts/bench/products.py [--formats FORMAT...] [--rows N...] [--workers N] [--columns K] [--mb MB]
                                     [--rounds N] [--against CHECKOUT] [--json]

Each participant is the kernel of the output matrix in one format, for one number of rows, with random weights of
so many megabytes as 8 bits. A round calls each in random order, as often as `--calls`, and keeps the best. `--against`
compares with the kernels of another checkout of this project, on the same weights; a ratio is this one's time over the
other's, paired by round, with its 95 % bootstrap interval: below 1 this one is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import iree.runtime as rt
import numpy as np
from comparison.here import compile_here
from comparison.script import end, say

from llmbuild.errors import LlmbuildError
from llmbuild.kernels.choose import instructions
from llmbuild.kernels.head import HeadShape, head, scores
from llmbuild.kernels.layouts import PANEL, family
from llmbuild.profiler import statistics
from llmbuild.report.rows import quantity
from llmbuild.report.table import table
from llmbuild.runtime import host
from llmbuild.runtime.calls import PolledCaller
from llmbuild.runtime.code import mapped
from llmbuild.runtime.session import threaded_device

FORMATS = ("int8", "int6_g32s8", "int5_g32s8", "q4_1", "int3_g32s8", "f12_e4m7", "f16")
OURS, OTHER = "this", "against"
WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
from products import write
write(*sys.argv[2:])
"""


@dataclass(frozen=True)
class Point:
    """One participant."""

    form: str
    rows: int
    whose: str

    @property
    def name(self) -> str:
        """Return it as a file's name."""
        return f"{self.form}-{self.rows}-{self.whose}"


def shape_of(form: str, columns: int, outputs: int, workers: int) -> HeadShape:
    """Return the matrix."""
    unit = instructions(host.features(), form)
    return HeadShape(columns, outputs, 1e-5, workers, form, unit.kernels[family(form)].narrow)


def sizes(shape: HeadShape) -> tuple[int, int]:
    """Return the bytes of the codes and of the scales."""
    panels = shape.padded // PANEL
    return panels * shape.layout.panel_bytes, panels * shape.layout.scale_bytes


def write(form: str, columns: str, outputs: str, workers: str, rows: str, target: str) -> None:
    """Write MLIR of `main(x f32[rows, width], norm, codes, scales) -> logits`; arguments come from a command line."""
    shape = shape_of(form, int(columns), int(outputs), int(workers))
    unit, layout = instructions(host.features(), form), shape.layout
    held = [f"tensor<{size}xi8>" for size in sizes(shape)]
    counts = [layout.panel_elements, layout.scale_elements]
    elements = [layout.element, layout.scale_element]
    panels = shape.padded // PANEL
    kinds = [f"tensor<{panels * n}x{e}>" for n, e in zip(counts, elements, strict=True)]
    seen = "\n".join(as_stored(name, *both) for name, *both in zip(("w", "s"), held, kinds, strict=True))
    x, norm = f"tensor<{rows}x{shape.width}xf32>", f"tensor<{shape.width}xf32>"
    taken = f"%x: {x}, %norm: {norm}, %w_b: {held[0]}, %s_b: {held[1]}"
    if rows == "1":
        logits = f"tensor<{shape.padded}xf32>"
        call = f"""%r:2 = util.call @head(%x, %norm, %w, %s)
    : ({x}, {norm}, {kinds[0]}, {kinds[1]}) -> ({logits}, tensor<1xi64>)"""
        result = "%r#0"
    else:
        many, logits = f"tensor<?x{shape.width}xf32>", f"tensor<?x{shape.padded}xf32>"
        call = f"""%y = tensor.cast %x : {x} to {many}
%r = util.call @{scores("head")}(%y, %norm, %w, %s) : ({many}, {norm}, {kinds[0]}, {kinds[1]}) -> {logits}"""
        result = "%r"
    Path(target).write_text(f"""{head("head", shape, unit)}
util.func public @main({taken}) -> {logits} attributes {{iree.abi.model = "coarse-fences"}} {{
{seen}
{call}
util.return {result} : {logits}
}}""")


def as_stored(name: str, held: str, wanted: str) -> str:
    """Return the operation that sees bytes as what is stored."""
    if held == wanted:
        return f"%{name} = util.optimization_barrier %{name}_b : {held}"
    return f"%{name} = flow.tensor.bitcast %{name}_b : {held} -> {wanted}"


def compiled(args: argparse.Namespace, point: Point, folder: Path) -> Path:
    """Return the artifact of a participant."""
    source, artifact = folder / f"{point.name}.mlir", folder / f"{point.name}.vmfb"
    told = (point.form, str(args.columns), str(outputs(args)), str(args.workers), str(point.rows), str(source))
    if point.whose == OURS:
        write(*told)
    else:
        environment = {**os.environ, "PYTHONPATH": str(args.against.resolve())}
        command = [sys.executable, "-P", "-c", WRITE, str(Path(__file__).resolve().parent), *told]
        subprocess.run(command, env=environment, check=True)
    if failure := compile_here(source, artifact):
        raise LlmbuildError(f"{point.name}: {failure.reason}")
    return artifact


def outputs(args: argparse.Namespace) -> int:
    """Return the outputs of the matrix."""
    return int(args.mb * 1e6 / args.columns) // PANEL * PANEL


class Runner:
    """Opened artifacts on one device with pinned workers."""

    def __init__(self, workers: int) -> None:
        self._device, self._instance = threaded_device(workers), rt.VmInstance()
        self._calls: dict[Point, Callable[[], object]] = {}

    def open(self, point: Point, artifact: Path, shape: HeadShape) -> None:
        """Open one, with weights of its own."""
        module = mapped(self._instance, artifact)
        context = rt.VmContext(self._instance, [rt.create_hal_module(self._instance, self._device), module])
        random_bytes = np.random.default_rng(0).integers(-100, 100, sizes(shape)[0], dtype=np.int8)
        arrays = [
            np.ones((point.rows, shape.width), np.float32),
            np.ones(shape.width, np.float32),
            random_bytes,
            np.zeros(sizes(shape)[1], np.int8),
        ]
        views = [self._copied(array) for array in arrays]
        function, caller = module.lookup_function("main"), PolledCaller(self._device, context, 1)
        self._calls[point] = lambda: caller(function, views, alike="products")

    def _copied(self, array: np.ndarray) -> rt.HalBufferView:
        kinds = {np.dtype(np.float32): rt.HalElementType.FLOAT_32, np.dtype(np.int8): rt.HalElementType.SINT_8}
        return self._device.allocator.allocate_buffer_copy(
            memory_type=rt.MemoryType.DEVICE_LOCAL | rt.MemoryType.HOST_VISIBLE,
            allowed_usage=rt.BufferUsage.DEFAULT | rt.BufferUsage.MAPPING,
            device=self._device,
            buffer=array,
            element_type=kinds[array.dtype],
        )

    def seconds(self, point: Point) -> float:
        """Return how long one call took."""
        begin = perf_counter()
        self._calls[point]()
        return perf_counter() - begin


def measured(args: argparse.Namespace, points: Sequence[Point]) -> dict[Point, list[float]]:
    """Return the seconds of each participant, round by round."""
    runner, order = Runner(args.workers), random.Random(0)
    with TemporaryDirectory() as folder:
        for number, point in enumerate(points, 1):
            say(f"[{number}/{len(points)}] {point.name}")
            shape = shape_of(point.form, args.columns, outputs(args), args.workers)
            runner.open(point, compiled(args, point, Path(folder)), shape)
        found: dict[Point, list[float]] = {point: [] for point in points}
        for _ in range(args.rounds):
            for point in order.sample(list(points), len(points)):
                runner.seconds(point)  # caches and clocks are as this one leaves them
                found[point].append(min(runner.seconds(point) for _ in range(args.calls)))
    return found


def lines(args: argparse.Namespace, found: dict[Point, list[float]]) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each format and number of rows."""
    for point, seconds in found.items():
        if point.whose != OURS:
            continue
        shape = shape_of(point.form, args.columns, outputs(args), args.workers)
        middle, size = statistics.middle(seconds), sum(sizes(shape))
        row = {"format": point.form, "rows": point.rows, "seconds": middle, "bytes": size}
        if other := found.get(Point(point.form, point.rows, OTHER)):
            ratio = statistics.paired_ratio(seconds, other)
            row |= {"against": statistics.middle(other), "ratio": ratio.median, "interval": [ratio.low, ratio.high]}
        yield row


def readable(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table."""
    names = ["format", "rows", "time", "GB/s", *(("against", "ratio") if "ratio" in rows[0] else ())]
    made = []
    for row in rows:
        rate = f"{row['bytes'] / row['seconds'] / 1e9:.1f}"
        cells = [row["format"], str(row["rows"]), quantity(row["seconds"], "s"), rate]
        if "ratio" in row:
            low, high = row["interval"]
            cells += [quantity(row["against"], "s"), f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"]
        made.append(cells)
    return table(names, made)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="FORMAT")
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 4, 8), metavar="N")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--columns", type=int, default=960)
    parser.add_argument("--mb", type=float, default=126, help="size of the matrix as bytes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    whose = (OURS, OTHER) if args.against else (OURS,)
    points = [Point(form, rows, who) for form in args.formats for rows in args.rows for who in whose]
    rows = list(lines(args, measured(args, points)))
    print(json.dumps(rows) if args.json else readable(rows))


if __name__ == "__main__":
    end(main)
