"""Estimates of steps on machines and models that are held out whole, beside simpler ones, as percentage errors.

    python scripts/bench/estimates.py [--seed N] [--draws N] [--method M]... [--each] [--json]

For each machine, and each model, everything else is learned from. Then 0, 1, 3 or 10 of its rows, drawn by the seed,
are seen, and the others are estimated. An error is exp |log of the ratio| - 1: a cell has the median and what nine of
ten stay below; each machine or model counts once. Models of one shape are held out together. It measures no time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices are small: threads wait for each other more than they compute

import numpy as np
from comparison.estimators import METHODS, OURS, Ours, logs_of
from comparison.script import end, say

from llmbuild.fleet.estimate.estimator import Quantity
from llmbuild.fleet.estimate.figures import Observation, observations
from llmbuild.report.table import table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SEEN = (0, 1, 3, 10)
LEAST = 5
"""Rows that a machine or a model must have to be judged."""
NINE_IN_TEN = 1.645
STEPS = np.linspace(0.005, 0.995, 100)

KEYS: dict[str, Callable[[Observation], str]] = {
    "machine": lambda one: one.point.machine.name,
    "model": lambda one: f"{one.point.model.layers} layers, {one.point.model.kv_bytes:.0f} B",
}


@dataclass(frozen=True)
class Fold:
    """Errors of one method on one machine or model, by how many of its rows were seen."""

    what: str
    held: str
    name: str
    method: str
    errors: dict[int, Array]
    covered: float | None
    """Share of rows within the interval that should hold nine of ten, before any was seen."""


def main(words: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=10, help="of the rows that are seen")
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--each", action="store_true", help="a line for each machine and model as well")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    quantities: tuple[Quantity, ...] = ("seconds", "watts")
    found: list[Fold] = []
    for quantity in quantities:
        for held in KEYS:
            for method in asked.method or METHODS:
                say(f"{quantity}, {held} held out: {method}")
                found += folds(quantity, held, method, asked.seed, asked.draws)
    lines = [line for group in _grouped(found) for line in _lines(group, asked.each)]
    header = ["what", "held out", "of", "method", *(f"{n} seen" for n in SEEN), "covered"]
    if asked.json:
        print(json.dumps([dict(zip(header, line, strict=True)) for line in lines], indent=1))
    else:
        print(table(header, lines, (0, 1, 3)))
    return 0


def folds(quantity: Quantity, held: str, method: str, seed: int, draws: int) -> list[Fold]:
    """Return the errors on every machine or model; of seconds also those of prompts alone."""
    key = KEYS[held]
    rows = [one for one in observations() if quantity == "seconds" or one.watts]
    found = []
    for name in sorted({key(one) for one in rows}):
        train = [one for one in rows if key(one) != name]
        if quantity == "watts" and method == OURS:
            train = [one for one in observations() if key(one) != name]  # it learns shares of time from all
        out = [one for one in rows if key(one) == name]
        if len(out) < LEAST:
            continue
        logs = logs_of(out, quantity)
        made = METHODS[method](train, [one.point for one in out], quantity)
        covered = None
        if isinstance(made, Ours):
            together = made.together
            covered = float((np.abs(together.logs - logs) < NINE_IN_TEN * together.deviations).mean())
        kinds = {quantity: np.ones(len(out), bool)}
        if quantity == "seconds":
            kinds = {"steps": kinds["seconds"], "prompts": np.array([one.point.kind == "prefill" for one in out])}
        for what, judged in kinds.items():
            if judged.any():
                errors = {n: _errors(made.given, logs, judged, n, seed, draws) for n in SEEN if n < len(out)}
                found.append(Fold(what, held, name, method, errors, covered))
    return found


def _errors(
    given: Callable[[NDArray[np.int64], Array], Array],
    logs: Array,
    judged: NDArray[np.bool_],
    seen: int,
    seed: int,
    draws: int,
) -> Array:
    """Return quantiles of the errors on rows that were not seen."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws if seen else 1):
        which = rng.choice(len(logs), seen, replace=False)
        left = judged.copy()
        left[which] = False
        found.append(np.abs(given(which, logs[which]) - logs)[left])
    return np.quantile(np.concatenate(found), STEPS)


def _grouped(found: Sequence[Fold]) -> list[list[Fold]]:
    keys = dict.fromkeys((one.what, one.held, one.method) for one in found)
    return [[one for one in found if (one.what, one.held, one.method) == key] for key in keys]


def _lines(group: Sequence[Fold], each: bool) -> list[list[object]]:
    """Return the line of a method, and those of its parts."""
    one = group[0]
    cells = [_cell([fold.errors[n] for fold in group if n in fold.errors]) for n in SEEN]
    covered = [fold.covered for fold in group if fold.covered is not None and one.what != "prompts"]
    whole = [one.what, one.held, len(group), one.method, *cells, f"{np.mean(covered):.0%}" if covered else "-"]
    if not each:
        return [whole]
    parts = [
        [f.what, f.name, "", f.method, *(_cell([f.errors[n]] if n in f.errors else []) for n in SEEN),
         "-" if f.covered is None or f.what == "prompts" else f"{f.covered:.0%}"]
        for f in group
    ]  # fmt: skip
    return [whole, *parts]


def _cell(errors: Sequence[Array]) -> str:
    if not errors:
        return "-"
    median, most = np.exp(np.quantile(np.concatenate(errors), [0.5, 0.9])) - 1
    return f"{median:.0%} {most:.0%}"


if __name__ == "__main__":
    end(lambda: main(sys.argv[1:]))
