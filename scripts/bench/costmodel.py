"""Evaluate cost models on recorded studies: the ranking of one study's points after training on the others.

    python scripts/bench/costmodel.py [STUDY.jsonl.gz...] [--models NAME...] [--json]

All models are trained on losses relative to point 0, on the same rows, one study held out at a time:

    bytes     no training: the bytes that a step reads and writes
    nearest   the mean loss of the points of the other studies that differ in the fewest knobs
    knobs     what the search uses: the process of llmbuild.search.transfer over the choices
    static    a ridge regression on choices, the data of a front half and the sizes: known after a compile
    choices   the network of graph_model.py over one node that has the choices alone
    shapes    the same over the model's operators, each with its sizes and the choices, without edges
    graph     the same with edges: states of nodes pass along the flow of data, as in TpuGraphs and TGraph

All but `static` are known before anything is imported. Kendall's tau compares all pairs of points; the regret is the
distance from the best of the first k points to the best of all. `chance` is the mean over 200 random rankings. Below
the table: the mean tau of each model over studies and metrics, and what it has more than `knobs`, with 95 % intervals.
For these the measured units of each study are resampled (points with equal executables and settings are one); studies
are not, as there are too few. A model takes the place of `knobs` only if the interval lies above 0 and a replay by
scripts/bench/search.py is better for it; a graph form also has to beat `choices`, which is its network without a graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from program_graph import Graph, bytes_of, of_operators

from llmbuild.report.rows import table
from llmbuild.search.replay import RecordedStudy, read
from llmbuild.search.transfer import learn, regret
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.model import ModelFacts, read_facts
from llmbuild.spec.space import Point, Value
from llmbuild.spec.workload import Workload
from llmbuild.system.ranks import kendall

STUDIES = Path(__file__).parent / "studies"
STATIC = ("dispatches", "executables", "transient_bytes", "artifact_bytes", "parameter_bytes")
TOPS = (1, 5, 10)
RIDGE = 1.0
TIMES = ("tpot_s", "ttft_s")
RESAMPLES = 300
Column = tuple[str, Value]


@dataclass(frozen=True, eq=False)
class Subject:
    """A study with the model and the workload of its recipe, and its feasible points: point 0 first."""

    study: RecordedStudy
    facts: ModelFacts
    workload: Workload
    points: tuple[Point, ...]
    losses: Any
    """f64[N,2]: logarithms of `TIMES`, relative to point 0."""

    @staticmethod
    def of(path: Path) -> Subject:
        """Return the study of a file beside its recipe."""
        study, recipe = read(path), read_recipe(path.with_name(path.name.removesuffix(".jsonl.gz") + ".yaml"))
        facts = read_facts(Path(recipe.model.location) / "config.json")
        zero = study.space.default()
        feasible = {p: row.losses for p, row in study.rows.items() if row.losses is not None}
        points = (zero, *(p for p in feasible if p != zero))
        chosen = [study.objectives.index(name) for name in TIMES]
        losses = np.array([feasible[p] for p in points])[:, chosen]
        return Subject(study, facts, recipe.workloads[0], points, losses - losses[0])

    def graphs(self, metric: str) -> list[Graph]:
        """Return the drawn graph of each point: a decode step in the middle of an answer, or a prefill."""
        prompt, output = self.workload.prompt, self.workload.output
        tokens, position = (1, prompt + output // 2) if metric == "tpot_s" else (prompt, prompt)
        return [of_operators(self.facts, p.as_dict(), tokens, position) for p in self.points]


Model = Callable[[Subject, Sequence[Subject], str], Any]
"""Returns scores f64[N] of the held-out study's points, given the other studies, for a metric; less is faster."""


def columns_of(others: Sequence[Subject]) -> list[Column]:
    """Return the choices of all points."""
    return sorted({pair for other in others for p in other.points for pair in p.values}, key=str)


def chosen(points: Sequence[Point], columns: Sequence[Column]) -> Any:
    """Return f64[N,C]: choices as zeros and ones."""
    return np.array([[float(values.get(k) == v) for k, v in columns] for values in (p.as_dict() for p in points)])


def by_bytes(held: Subject, _: Sequence[Subject], metric: str) -> Any:
    """Rank by the bytes that a step moves."""
    return np.array([bytes_of(graph) for graph in held.graphs(metric)])


def by_nearest(held: Subject, others: Sequence[Subject], metric: str) -> Any:
    """Rank by the mean of the points that agree in the most choices."""
    columns = columns_of(others)
    known = np.vstack([chosen(o.points, columns) for o in others])
    losses = np.concatenate([o.losses[:, TIMES.index(metric)] for o in others])
    agree = chosen(held.points, columns) @ known.T
    return np.array([losses[row == row.max()].mean() for row in agree])


def by_knobs(held: Subject, others: Sequence[Subject], metric: str) -> Any:
    """Rank by the search's own model."""
    found = learn([o.study.lesson for o in others])
    assert found is not None
    return found.predict(held.points, (metric,))[:, 0]


def static(subject: Subject, columns: Sequence[Column]) -> Any:
    """Return f64[N,F]: choices as zeros and ones, static features as logarithms relative to point 0."""
    told = [subject.study.rows[p].features for p in subject.points]
    sizes = np.log([[row.get(k, 0) + 1 for k in STATIC] for row in told])
    return np.hstack([np.ones((len(told), 1)), chosen(subject.points, columns), sizes - sizes[0]])


def by_ridge(held: Subject, others: Sequence[Subject], metric: str) -> Any:
    """Rank by a linear model of choices and sizes."""
    columns = columns_of(others)
    x = np.vstack([static(o, columns)[1:] for o in others])
    y = np.concatenate([o.losses[1:, TIMES.index(metric)] for o in others])
    return static(held, columns) @ np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)


def by_graph(held: Subject, others: Sequence[Subject], metric: str) -> Any:
    """Rank by the network over operators."""
    return _by_network(held, others, metric, lambda subject: subject.graphs(metric))


def by_shapes(held: Subject, others: Sequence[Subject], metric: str) -> Any:
    """Rank by the network over operators that do not hear of each other."""
    return _by_network(held, others, metric, lambda subject: [replace(g, edges=()) for g in subject.graphs(metric)])


def by_choices(held: Subject, others: Sequence[Subject], metric: str) -> Any:
    """Rank by the network over a node without a size."""
    return _by_network(held, others, metric, lambda subject: [BLANK] * len(subject.points))


BLANK = Graph(np.zeros((1, 1)), np.ones(1), ())


def _by_network(held: Subject, others: Sequence[Subject], metric: str, drawn: Callable[[Subject], list[Graph]]) -> Any:
    from graph_model import Lessons, batched, scores

    columns, one = columns_of(others), TIMES.index(metric)
    lessons = [Lessons.of(batched(drawn(o), chosen(o.points, columns)), o.losses[:, one]) for o in others]
    return scores(lessons, batched(drawn(held), chosen(held.points, columns)))


MODELS: dict[str, Model] = {
    "bytes": by_bytes,
    "nearest": by_nearest,
    "knobs": by_knobs,
    "static": by_ridge,
    "choices": by_choices,
    "shapes": by_shapes,
    "graph": by_graph,
}
TODAY = "knobs"


@dataclass(frozen=True)
class Fold:
    """One study held out, one metric: actual losses f64[N], each model's scores f64[N] and the measured unit of each
    point, all without point 0.
    """

    held: str
    metric: str
    actual: Any
    scores: dict[str, Any]
    units: tuple[str, ...]

    def resampled(self, source: np.random.Generator) -> Any:
        """Return indices of points whose units were drawn with replacement."""
        _, unit = np.unique(self.units, return_inverse=True)
        drawn = source.integers(0, unit.max() + 1, unit.max() + 1)
        return np.concatenate([np.flatnonzero(unit == u) for u in drawn])

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each model, and one for chance."""
        source = np.random.default_rng(0)
        random = [_judged(source.permutation(len(self.actual)).astype(float), self.actual) for _ in range(200)]
        found = {name: _judged(score, self.actual) for name, score in self.scores.items()}
        found["chance"] = {k: float(np.mean([row[k] for row in random])) for k in random[0]}
        return [{"held_out": self.held, "model": name, "metric": self.metric, **row} for name, row in found.items()]


def _judged(predicted: Any, actual: Any) -> dict[str, float]:
    return {"kendall": kendall(predicted, actual), **{f"regret_top{k}": regret(predicted, actual, k) for k in TOPS}}


def compared(folds: Sequence[Fold]) -> list[dict[str, Any]]:
    """Return the mean tau of each model and of its difference from today's, with intervals."""
    source = np.random.default_rng(0)
    names = list(folds[0].scores)
    drawn = np.empty((RESAMPLES, len(folds), len(names)))
    for f, fold in enumerate(folds):
        for r in range(RESAMPLES):
            taken = fold.resampled(source)
            drawn[r, f] = [kendall(fold.scores[n][taken], fold.actual[taken]) for n in names]
    means = drawn.mean(1)
    rows = []
    for n, name in enumerate(names):
        tau = float(np.mean([kendall(fold.scores[name], fold.actual) for fold in folds]))
        base = float(np.mean([kendall(fold.scores[TODAY], fold.actual) for fold in folds])) if TODAY in names else tau
        apart = means[:, n] - means[:, names.index(TODAY)] if TODAY in names else means[:, n] * 0
        rows.append({"model": name, "kendall": _interval(tau, means[:, n]), "more": _interval(tau - base, apart)})
    return rows


def _interval(value: float, drawn: Any) -> list[float]:
    return [value, *np.quantile(drawn, [0.025, 0.975]).tolist()]


def main() -> None:
    """Print a table for each study held out, and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="*", default=sorted(STUDIES.glob("*.jsonl.gz")))
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    subjects = [Subject.of(path) for path in asked.studies]
    if len(subjects) < 2:
        raise SystemExit("a model is judged on a study it was not trained on: name two studies at least")
    folds = []
    for held in subjects:
        others = [o for o in subjects if o is not held]
        for metric in TIMES:
            scores = {name: MODELS[name](held, others, metric)[1:] for name in asked.models}
            units = tuple(held.study.rows[p].run for p in held.points[1:])
            folds.append(Fold(held.study.name, metric, held.losses[1:, TIMES.index(metric)], scores, units))
    rows = [row for fold in folds for row in fold.rows()]
    means = compared(folds)
    if asked.json:
        print(json.dumps({"rows": rows, "compared": means}))
        return
    shown = [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in rows]
    print(table(list(rows[0]), shown, left=(0, 1, 2)))
    told = [[row["model"], *("{:.3f} [{:.3f}, {:.3f}]".format(*row[k]) for k in ("kendall", "more"))] for row in means]
    print("\n" + table(["model", "mean tau", f"more than {TODAY}"], told, left=(0,)))


if __name__ == "__main__":
    main()
