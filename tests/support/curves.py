"""A load curve whose steps take what a formula says."""

from __future__ import annotations

from llmbuild.spec.load_curve import Cell, Fit, LoadCurve, Table, Work

FIT = Fit(True, Table((1, 2, 4, 8, 16, 64, 512), (5e-3, 5e-3, 6e-3, 9e-3, 15e-3, 60e-3, 480e-3)), 1e-4, 1e-7, 1e-7)


def curve(variant: str = "v" * 64, machine: str = "m" * 64, **more: object) -> LoadCurve:
    """Return a curve of `FIT` for a context of 1,024 tokens."""
    cells = tuple(Cell(work, FIT.seconds(work), FIT.seconds(work), FIT.seconds(work), 5) for work in WORKS)
    made: dict[str, object] = {
        "key": "k" * 64,
        "variant": variant,
        "artifact": "a" * 64,
        "machine": machine,
        "driver": "local-task",
        "workers": 2,
        "context": 1024,
        "decodes_most": 16,
        "prompt_most": 512,
        "fit": FIT,
        "cells": cells,
        "error_p95": 0.1,
        "turn_s": 1e-5,
        "row_s": 2e-5,
        "notes": {"rounds": "5"},
    }
    return LoadCurve(**{**made, **more})  # type: ignore[arg-type]


WORKS = (Work.of([(512, 1)]), Work.of([(512, 1)] * 16), Work.of([(0, 512)]))
