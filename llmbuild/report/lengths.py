"""How predictors of lengths do, as rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from llmbuild.serve.predict.judge import Score


def rows(scores: Sequence[Score]) -> list[dict[str, object]]:
    """Return a row for each predictor and number of tokens after which it was asked."""
    return [{name: _short(one) for name, one in asdict(score).items()} for score in scores]


def _short(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value
