"""The plot of a comparison: KL divergence against bytes and against decoding time, a line for each runtime's front."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = (("size_bytes", 1e6, "MB of files"), ("decode_s", 1e-3, "ms for each token"))


def needs_matplotlib() -> str:
    """Return why no plot can be written here; empty where one can. It is asked before minutes are spent."""
    return "" if find_spec("matplotlib") else "--plot needs matplotlib: pip install 'llmbuild[plots]'"


def saved(figure: Figure, path: Path) -> None:
    """Write a figure; equal ones are equal files, without a date in them."""
    from matplotlib import rc_context

    vector = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "llmbuild"}):
        figure.savefig(path, **vector)


def write(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write the plot; the type of picture is that of the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title)
    scored = [row for row in rows if row["quality_kl"] and row["decode_s"]]
    for axes, (metric, unit, label) in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        for runtime in sorted({row["runtime"] for row in scored}):
            mine = sorted((row for row in scored if row["runtime"] == runtime), key=lambda row: row[metric])
            (line,) = axes.plot(*_front(mine, metric, unit), label=runtime)
            places = [row[metric] / unit for row in mine], [row["quality_kl"] for row in mine]
            axes.scatter(*places, s=14, color=line.get_color())
            for row, x, y in zip(mine, *places, strict=True):
                axes.annotate(row["participant"].removeprefix(runtime).strip(), (x, y), fontsize=6)
        axes.set(xlabel=label, yscale="log")
        axes.grid(True, alpha=0.3)
    figure.axes[0].set_ylabel("KL divergence from f32 (nat)")
    figure.axes[0].legend()
    saved(figure, path)


def _front(rows: Sequence[dict[str, Any]], metric: str, unit: float) -> tuple[list[float], list[float]]:
    """Return where the rows lie that no smaller one equals in KL; `rows` are sorted by the metric."""
    places: list[tuple[float, float]] = []
    for row in rows:
        if not places or row["quality_kl"] < places[-1][1]:
            places.append((row[metric] / unit, row["quality_kl"]))
    return [x for x, _ in places], [y for _, y in places]
