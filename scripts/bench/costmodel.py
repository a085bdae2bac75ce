"""Evaluate cost models on recorded studies: the ranking of one study's points after training on the others.

    python scripts/bench/costmodel.py [STUDY.jsonl.gz...] [--json]

Two models, both trained on losses relative to point 0: `knobs` is the process of llmbuild.search.transfer over the
choices alone, known before anything is compiled; `static` is a ridge regression on choices and on the data of a front
half and the sizes (dispatches, executables, transient, artifact and parameter bytes), known before a run. Kendall's
tau compares all pairs of points; the regret is the distance from the best of the first k points to the best of all.
`chance` is the mean over 200 random rankings. A model is used in the search only if it improves the replay of
scripts/bench/search.py (`ours` against `ours-cold`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from llmbuild.report.rows import table
from llmbuild.search.replay import RecordedStudy, read
from llmbuild.search.transfer import learn, regret
from llmbuild.spec.space import Point
from llmbuild.system.ranks import kendall

STUDIES = Path(__file__).parent / "studies"
STATIC = ("dispatches", "executables", "transient_bytes", "artifact_bytes", "parameter_bytes")
TOPS = (1, 5, 10)
RIDGE = 1.0


def relative(study: RecordedStudy) -> tuple[list[Point], Any]:
    """Return the feasible points but point 0, and their losses f64[N,D] relative to it."""
    zero = study.space.default()
    base = study.rows[zero].losses
    rows = [(p, row.losses) for p, row in study.rows.items() if row.losses is not None and p != zero]
    assert base is not None
    return [p for p, _ in rows], np.array([y for _, y in rows]) - np.array(base)


def static(study: RecordedStudy, points: list[Point], columns: list[tuple[str, Any]]) -> Any:
    """Return f64[N,F]: choices as zeros and ones, static features as logarithms relative to point 0."""
    zero = study.rows[study.space.default()].features
    rows = []
    for point in points:
        values, told = point.as_dict(), study.rows[point].features
        chosen = [float(values.get(name) == value) for name, value in columns]
        rows.append([1.0, *chosen, *(np.log((told.get(k, 0) + 1) / (zero.get(k, 0) + 1)) for k in STATIC)])
    return np.array(rows)


def by_ridge(held: RecordedStudy, others: list[RecordedStudy]) -> Any:
    """Return predicted losses f64[N,D] of the held-out study's points."""
    data = [(o, *relative(o)) for o in others]
    columns = sorted({(k, v) for _, points, _ in data for p in points for k, v in p.values}, key=str)
    x = np.vstack([static(o, points, columns) for o, points, _ in data])
    y = np.vstack([losses for _, _, losses in data])
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)
    return static(held, relative(held)[0], columns) @ weights


def by_knobs(held: RecordedStudy, others: list[RecordedStudy]) -> Any:
    """Return predicted losses f64[N,D] of the held-out study's points."""
    found = learn([o.lesson for o in others])
    assert found is not None
    return found.predict(relative(held)[0], held.objectives)


def judged(model: str, metric: str, predicted: Any, actual: Any) -> dict[str, Any]:
    """Return one row."""
    regrets = {f"regret_top{k}": regret(predicted, actual, k) for k in TOPS}
    return {"model": model, "metric": metric, "kendall": kendall(predicted, actual), **regrets}


def chance(metric: str, actual: Any) -> dict[str, Any]:
    """Return what random rankings come to."""
    source = np.random.default_rng(0)
    rows = [judged("chance", metric, source.permutation(len(actual)).astype(float), actual) for _ in range(200)]
    numbers = [k for k in rows[0] if k not in ("model", "metric")]
    return {"model": "chance", "metric": metric, **{k: float(np.mean([row[k] for row in rows])) for k in numbers}}


def main() -> None:
    """Print a table for each study held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="*", default=sorted(STUDIES.glob("*.jsonl.gz")))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    studies = [read(path) for path in asked.studies]
    if len(studies) < 2:
        raise SystemExit("a model is judged on a study it was not trained on: name two studies at least")
    found = []
    for held in studies:
        others = [o for o in studies if o is not held]
        actual = relative(held)[1]
        for name, predicted in (("knobs", by_knobs(held, others)), ("static", by_ridge(held, others))):
            for d, metric in enumerate(held.objectives[:2]):
                found.append({"held_out": held.name, **judged(name, metric, predicted[:, d], actual[:, d])})
        found += [{"held_out": held.name, **chance(m, actual[:, d])} for d, m in enumerate(held.objectives[:2])]
    if asked.json:
        print(json.dumps(found))
        return
    shown = [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in found]
    print(table(list(found[0]), shown, left=(0, 1, 2)))


if __name__ == "__main__":
    main()
