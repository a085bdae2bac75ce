"""Operators' profiles from published tables: those of aiconfigurator-core 0.12.0 (Apache-2.0), measured by NVIDIA.

`operators.csv` beside this file has microseconds of one call, in 16 bits: of products and experts by rows, of attention
by rows and positions, of one prompt's attention by its tokens. They are vLLM's kernels, 0.24.0 on H100 and 0.14.0 on
A100; tokens choose experts by the power law 1.2. The tables have no row of just these matrices: between their widths
straight lines were drawn, and beyond the widest, 65,536 columns, the last line goes on: heads have up to 151,936. A
call with few rows that is slower than one with more is taken as padded to that.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import accumulate

from llmbuild.errors import InputError
from llmbuild.fleet.estimate.figures import machines
from llmbuild.fleet.operators.profile import DENSE, OperatorProfile, Shape, Surface
from llmbuild.spec.decoder import Decoder
from llmbuild.spec.fleet import Line

SOURCE = "aiconfigurator-core 0.12.0 (PyPI, Apache-2.0): gemm, moe, context and generation attention of vLLM"
SHAPES = {
    each.name: each
    for each in (
        Shape("llama-3-8b", Decoder(4096, 14336, 32, 8, 128, 128256), 32),
        Shape("qwen3-14b", Decoder(5120, 17408, 40, 8, 128, 151936, head_norms=True), 40),
        Shape("qwen3-30b-a3b", Decoder(2048, 768, 32, 4, 128, 151936, head_norms=True), 48, experts=128, chosen=8),
        Shape("qwen3-32b", Decoder(5120, 25600, 64, 8, 128, 151936, head_norms=True), 64),
    )
}
"""Sizes by the config.json of meta-llama/Meta-Llama-3-8B and of Qwen's Qwen3-14B, -30B-A3B and -32B."""

Point = tuple[float, float, float]
"""Rows, positions, seconds."""


def shape(model: str, devices: int = 1) -> Shape:
    """Return the sizes of a model whose matrices are divided over so many devices.

    Raises:
        InputError: the model's sizes are not known.
    """
    if model not in SHAPES:
        raise InputError(f"no sizes of model {model}: there are {', '.join(SHAPES)}")
    return replace(SHAPES[model], devices=devices)


@cache
def published() -> dict[tuple[str, str, int], OperatorProfile]:
    """Return the profiles by device, model, and number of devices that its matrices are divided over."""
    found: dict[tuple[str, str, int], dict[str, list[Point]]] = {}
    with (files(__package__) / "operators.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kinds = found.setdefault((row["device"], row["model"], int(row["devices"])), {})
            point = (float(row["rows"]), float(row["context"]), float(row["us"]) * 1e-6)
            kinds.setdefault(row["kind"], []).append(point)
    return {(device, model, t): _profile(device, shape(model, t), k) for (device, model, t), k in found.items()}


def _profile(device: str, of: Shape, kinds: dict[str, list[Point]]) -> OperatorProfile:
    return OperatorProfile(
        shape=of,
        machine=machines()[device],
        dense=tuple((kind, _rising((rows, s) for rows, _, s in kinds[kind])) for kind in DENSE),
        decode=_surface(kinds["attention"]),
        prompt=_rising((tokens, s) for _, tokens, s in kinds["prompt_attention"]),
        basis="published",
        source=SOURCE,
    )


def _rising(points: Iterable[tuple[float, float]]) -> Line:
    """Return a line that never falls: each value is the least of those from it on."""
    at, values = zip(*sorted(points), strict=True)
    return Line(at, tuple(accumulate(reversed(values), min))[::-1])


def _surface(points: Iterable[Point]) -> Surface:
    """Return attention by rows; rows with a single number of positions have no slope, and are left out."""
    by_rows: dict[float, list[tuple[float, float]]] = {}
    for rows, context, seconds in points:
        by_rows.setdefault(rows, []).append((context, seconds))
    kept = [(rows, _rising(each)) for rows, each in sorted(by_rows.items()) if len(each) > 1]
    return Surface(tuple(rows for rows, _ in kept), tuple(line for _, line in kept))
