"""The benchmarks' catalogs that were never built, for tests too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

from synthetic import TARGET, WORKLOAD, Made, fill, multiply, slower, toolchain

__all__ = ["TARGET", "THREE", "WORKLOAD", "Made", "fill", "multiply", "slower", "toolchain"]

THREE = (
    Made("default", "dominated", 0.02, 0.2, default=True),
    Made("fast", "pareto", 0.01, 0.3),
    Made("small", "undecided", 0.015, 0.1, parameters=b"small weights"),
)
