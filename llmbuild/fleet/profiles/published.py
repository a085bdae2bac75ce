"""Profiles from published figures: step times are fitted on rows that each name their source.

Rows are in `published.csv` beside this file. A row's `use` says what it tells: `step` rows are batches from the first
prompt to the last token, `prompt` rows give the time of a prompt token, `power` rows the watts of a batch. A `factor`
other than 1 scales a row of another model: what is made of it is an estimate.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from llmbuild.fleet.estimate.figures import WIDTHS, machines, models
from llmbuild.spec.fleet import Basis, Line, Profile, StepPower, StepTime

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LOAD_S = 39.0
"""An 8B model from start to first answer with compilation: vLLM pull request 11005."""
SHARE_W = {1.0: 0.57, 64.0: 0.79}
"""Share of the board limit by rows where no watts were published: those of A100."""


@dataclass(frozen=True)
class Published:
    """One row: a batch of prompts and answers, in seconds and watts."""

    device: str
    model: str
    use: str
    factor: float
    precision: str
    engine: str
    phase: str
    rows: float
    prompt: float
    output: float
    seconds: float
    watts: float
    source: str


@cache
def published() -> tuple[Profile, ...]:
    """Return a profile for each device and model with published rows."""
    rows = _rows()
    kinds = dict.fromkeys((row.device, row.model) for row in rows)
    return tuple(_profile([r for r in rows if (r.device, r.model) == kind]) for kind in kinds)


def _rows() -> list[Published]:
    with (files(__package__) / "published.csv").open(encoding="utf-8") as file:
        return [_row(cells) for cells in csv.DictReader(file)]


def _row(cells: dict[str, str]) -> Published:
    rows, prompt, output = (float(cells[name] or 0) for name in ("batch", "input_tokens", "output_tokens"))
    if cells["latency_ms"]:
        seconds = float(cells["latency_ms"]) / 1e3
    else:
        seconds = rows * output / float(cells["output_tok_s"])
    factor = float(cells["factor"])
    return Published(
        device=cells["device"],
        model=cells["model"],
        use=cells["use"],
        factor=factor,
        precision=cells["precision"],
        engine=cells["engine"],
        phase=cells["phase"],
        rows=rows,
        prompt=prompt,
        output=output,
        seconds=seconds * factor,
        watts=float(cells["power_w"] or 0),
        source=cells["source"],
    )


def _profile(rows: Sequence[Published]) -> Profile:
    """Return what the rows of one device and model come to."""
    steps, prompts, powers = ([r for r in rows if r.use == use] for use in ("step", "prompt", "power"))
    device, model, precision = steps[0].device, steps[0].model, steps[0].precision
    prompt_s = _prompt_s(prompts)
    line, context_s, error = _fitted(steps, prompt_s)
    scaled = any(row.factor != 1 for row in steps)
    figures = models()[model]
    told = f"{steps[0].engine}, {precision}: {_sources(steps)}"
    told += f"; prompts: {prompts[0].engine}, {_sources(prompts)}; load: vLLM pull request 11005"
    told += f"; watts: {_sources(powers)}" if powers else "; watts: A100's share of the board's limit"
    if scaled:
        told += f"; from LLaMA 7B, seconds x {steps[0].factor:g}"
    return Profile(
        device=device,
        model=model,
        variant=precision,
        step=StepTime(line, context_s, prompt_s),
        power=_power(device, powers),
        max_rows=int(max(row.rows for row in steps)),
        weights_bytes=figures.parameters * WIDTHS[precision],
        kv_bytes_per_token=figures.kv_bytes,
        load_s=LOAD_S,
        decode_basis="estimated" if scaled else "published",
        prompt_basis=_prompt_basis(steps, prompts),
        power_basis="published" if powers else "estimated",
        source=told,
        error=error,
    )


def _sources(rows: Sequence[Published]) -> str:
    return ", ".join(dict.fromkeys(row.source for row in rows))


def _prompt_basis(steps: Sequence[Published], prompts: Sequence[Published]) -> Basis:
    """Return the basis of a prompt's seconds: another engine's, or another model's, are an estimate."""
    same = all(row.factor == 1 and row.engine == steps[0].engine for row in prompts)
    return "published" if same else "estimated"


def _power(device: str, rows: Sequence[Published]) -> StepPower:
    # prompts of 2048 tokens and more draw 0.99 to 1.00 of the limit on A100 (Splitwise), a mix 0.98 on H100 (ML.ENERGY)
    limit = machines()[device].board_w
    found = {row.rows: row.watts for row in rows} or {at: share * limit for at, share in SHARE_W.items()}
    at = tuple(sorted(found))
    return StepPower(Line(at, tuple(found[x] for x in at)), limit)


def _prompt_s(rows: Sequence[Published]) -> float:
    """Return the seconds of a prompt token: the slope between two first tokens, or a fit of steps with prompts."""
    if rows[0].phase == "prefill":
        short, long = min(rows, key=lambda r: r.prompt), max(rows, key=lambda r: r.prompt)
        return (long.seconds - short.seconds) / (long.prompt - short.prompt)
    places = _places(rows)
    lines = [
        np.array([*_hat(r.rows, places), r.rows * (r.prompt + r.output / 2), r.rows * r.prompt / r.output]) / r.seconds
        for r in rows
    ]
    return float(least_squares(np.array(lines), np.ones(len(rows)))[-1])


def _fitted(rows: Sequence[Published], prompt_s: float) -> tuple[Line, float, float]:
    """Return decode seconds by rows, seconds for each position seen, and the largest relative error on the rows."""
    places = _places(rows)
    lines = np.array(
        [
            np.array([*(r.output * _hat(r.rows, places)), r.output * r.rows * (r.prompt + r.output / 2)]) / r.seconds
            for r in rows
        ]
    )
    rest = np.array([1 - prompt_s * r.rows * r.prompt / r.seconds for r in rows])
    found = least_squares(lines, rest)
    error = float(np.abs(lines @ found - rest).max())
    return Line(tuple(places), tuple(float(x) for x in found[:-1])), float(found[-1]), error


def _places(rows: Sequence[Published]) -> list[float]:
    """Return the numbers of rows between which lines are drawn: all, or the ends where rows are few."""
    at = sorted({row.rows for row in rows})
    return at if len(rows) >= 3 * len(at) else [at[0], at[-1]]


def _hat(x: float, places: Sequence[float]) -> Array:
    """Return the weights of the places for the value at x."""
    weights = np.zeros(len(places))
    i = int(np.clip(np.searchsorted(places, x), 1, len(places) - 1))
    share = (x - places[i - 1]) / (places[i] - places[i - 1])
    weights[i - 1], weights[i] = 1 - share, share
    return weights


def least_squares(lines: Array, values: Array) -> Array:
    """Return the least-squares solution without a negative part; every subset of the few columns is tried."""
    width = lines.shape[1]
    best, least = np.zeros(width), float((values**2).sum())
    for count in range(1, width + 1):
        for kept in combinations(range(width), count):
            part = np.linalg.lstsq(lines[:, kept], values, rcond=None)[0]
            rest = float(((lines[:, kept] @ part - values) ** 2).sum())
            if (part >= 0).all() and rest < least * (1 - 1e-12):
                best, least = np.zeros(width), rest
                best[list(kept)] = part
    return best
