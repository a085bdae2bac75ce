"""Replay searches on recorded exhaustive studies: how few evaluations, and how little time, reach the whole front.

    python scripts/bench/search.py [STUDY.jsonl.gz...] [--seeds N] [--share 0.95] [--samplers NAME...] [--json]

A study is what `scripts/bench/record.py` packed; all in scripts/bench/studies by default. A search is worth the volume
between its front and losses half as much again as those of the compiler's defaults (for quality: its bound), in
logarithms, as a share of the volume of the front of all points. Evaluations are unique: what a sampler asks twice, or
what has the executable and settings of a point measured before, costs it none; `of distinct` is their share of all
such points, `of points` of the whole grid. Seconds are those of the recording, each import and each compile paid for
once. Medians over the seeds, in brackets the quartiles; a search that never gets there counts as one that needs all.

    ours             as `llmbuild build` searches: point 0, points that did well elsewhere, then a model that starts
                     from the other studies
    ours-cold        the same from point 0 alone, without the other studies
    ours-warm        without them, but with a list of points that did well elsewhere right after point 0
    ours-related     the same with the fronts of the other studies as the list
    tpe              Optuna's TPE, multivariate in groups
    default          Optuna's default for several objectives   nsga2 its NSGA-II
    random           Optuna's RandomSampler               random-plain  and equal executables are measured again
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from optuna.samplers import BaseSampler, TPESampler

from llmbuild.report.rows import table
from llmbuild.search.replay import RecordedStudy, Run, read, replay
from llmbuild.search.sampler import FrontSampler
from llmbuild.search.study import Study, sampler_of
from llmbuild.search.warm_start import initial_points

STUDIES = Path(__file__).parent / "studies"
MARKS = (0.05, 0.1, 0.15, 0.25, 0.5)
"""Shares of a study's distinct points at which the volume is told."""

PLAIN = "random-plain"
SAMPLERS = (
    "ours",
    "ours-cold",
    "ours-warm",
    "ours-related",
    "tpe",
    "default",
    "nsga2",
    "random",
    PLAIN,
)


def make(name: str, study: RecordedStudy, others: tuple[RecordedStudy, ...], seed: int) -> Study:
    """Return a search by name; every one is given point 0 first, as a build does."""
    space, objectives, reach = study.space, study.objectives, study.interest
    zero, warm = [space.default()], initial_points(space)

    def of(chosen: BaseSampler, initial: list[Any]) -> Study:
        return Study(space, objectives, chosen, seed, initial)

    made: dict[str, Callable[[], Study]] = {
        "ours": lambda: of(sampler_of("auto", space, objectives, reach, seed, [o.lesson for o in others]), warm),
        "ours-cold": lambda: of(FrontSampler(space, reach, seed), zero),
        "ours-warm": lambda: of(sampler_of("auto", space, objectives, reach, seed), warm),
        "ours-related": lambda: of(FrontSampler(space, reach, seed), related(study, others)),
        "default": lambda: of(TPESampler(seed=seed), zero),
    }
    plain = name.removesuffix("-plain")
    return made[name]() if name in made else of(sampler_of(plain, space, objectives, reach, seed), zero)


def related(study: RecordedStudy, others: tuple[RecordedStudy, ...]) -> list[Any]:
    """Return point 0 and the fronts of other studies, as far as this space allows them."""
    fronts = [p.as_dict() for other in others for p in other.front()]
    found = [study.space.default()]
    for values in fronts:
        point = study.space.complete({k.name: values.get(k.name, k.default) for k in study.space.knobs})
        if study.space.contains(point):
            found.append(point)
    return list(dict.fromkeys(found))


def summary(name: str, runs: list[Run], points: int, grid: int, share: float) -> dict[str, Any]:
    """Return one row of the table."""
    needed = [run.evaluations_to(share) or len(run.shares) for run in runs]
    seconds = [run.seconds_to(share) or run.seconds[-1] for run in runs]
    curve = np.median(np.array([pad(run.shares, points) for run in runs]), axis=0)
    return {
        "sampler": name,
        "evaluations": quartiles(needed),
        "of_distinct": float(np.median(needed)) / points,
        "of_points": float(np.median(needed)) / grid,
        "seconds": quartiles(seconds),
        "never": sum(run.evaluations_to(share) is None for run in runs),
        "share_at": {f"{mark:.0%}": float(curve[int(mark * points) - 1]) for mark in MARKS},
        "curve": [float(v) for v in curve],
    }


def quartiles(values: list[Any]) -> list[float]:
    """Return median, lower and upper quartile."""
    return [float(np.percentile(values, p)) for p in (50, 25, 75)]


def pad(shares: tuple[float, ...], points: int) -> list[float]:
    """Return the shares over all evaluations; the last one stays."""
    return [*shares, *[shares[-1]] * (points - len(shares))][:points]


def compare(study: RecordedStudy, others: tuple[RecordedStudy, ...], asked: argparse.Namespace) -> dict[str, Any]:
    """Return what every sampler did on a study."""
    points = study.distinct
    rows = []
    for name in asked.samplers:
        seeds = range(asked.seeds)
        known = name != PLAIN
        most = points if known else len(study.rows)
        runs = [replay(study, make(name, study, others, seed), most, asked.until, known) for seed in seeds]
        rows.append(summary(name, runs, points, len(study.rows), asked.share))
    return {
        "study": study.name,
        "machine": study.machine,
        "points": len(study.rows),
        "distinct": points,
        "feasible": sum(row.losses is not None for row in study.rows.values()),
        "front": len(study.front()),
        "objectives": list(study.objectives),
        "seeds": asked.seeds,
        "share": asked.share,
        "samplers": rows,
    }


def text(found: dict[str, Any]) -> str:
    """Return one study's table for people."""
    head = (
        f"{found['study']}: {found['points']} points, {found['distinct']} distinct, {found['feasible']} feasible, "
        f"{found['front']} on the front of "
        f"{', '.join(found['objectives'])}; {found['seeds']} seeds; {found['machine']}"
    )
    random = next((r["evaluations"][0] for r in found["samplers"] if r["sampler"] == "random"), None)
    lines = [
        [
            row["sampler"],
            "{:.0f} [{:.0f}, {:.0f}]".format(*row["evaluations"]),
            f"{row['of_distinct']:.1%}",
            f"{row['of_points']:.1%}",
            "-" if random is None else f"{random / row['evaluations'][0]:.1f}x",
            "{:.0f} [{:.0f}, {:.0f}]".format(*row["seconds"]),
            *(f"{v:.2f}" for v in row["share_at"].values()),
        ]
        for row in found["samplers"]
    ]
    names = [f"evaluations to {found['share']:.0%}", "of distinct", "of points", "fewer than random", "seconds"]
    return head + "\n" + table(["sampler", *names, *(f"at {m:.0%}" for m in MARKS)], lines)


def main() -> None:
    """Print a table for each study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="*", default=sorted(STUDIES.glob("*.jsonl.gz")))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.95)
    parser.add_argument("--until", type=float, default=0.999, help="end a search at this share of the volume")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    studies = [read(path) for path in asked.studies]
    found = [compare(study, tuple(o for o in studies if o is not study), asked) for study in studies]
    print(json.dumps(found) if asked.json else "\n\n".join(map(text, found)))


if __name__ == "__main__":
    main()
