"""How alike two rankings are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def kendall(predicted: Sequence[float] | np.ndarray, actual: Sequence[float] | np.ndarray) -> float:
    """Return Kendall's tau-b of two rankings f64[N]: 1 where they agree, 0 where they are unrelated."""
    a, b = (np.sign(np.subtract.outer(np.asarray(one, float), np.asarray(one, float))) for one in (predicted, actual))
    scale = np.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum() / scale) if scale else 0.0
