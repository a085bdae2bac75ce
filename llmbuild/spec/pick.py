"""What the loader chose, and for every other variant the reason it was not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmbuild.spec.slo import Slo


@dataclass(frozen=True)
class Candidate:
    """One row of the catalog and the verdict on it; `reason` is empty for the one that was chosen."""

    row: dict[str, Any]
    accepted: bool
    reason: str


@dataclass(frozen=True)
class Pick:
    """The chosen row, if any; all candidates with their reasons; and the SLO that was asked."""

    slo: Slo
    chosen: dict[str, Any] | None
    candidates: tuple[Candidate, ...]
    nearest: dict[str, Any] | None = None
    distance: float = 0.0

    def explain(self) -> str:
        """Return the choice and the reasons, one line for each variant."""
        bounds = ", ".join(str(b) for b in self.slo.bounds) or "no bounds"
        lines = [f"asked: {bounds}; best {self.slo.objective}"]
        for c in sorted(self.candidates, key=lambda c: c.row is not self.chosen):
            value = c.row.get(self.slo.objective)
            shown = "absent" if value is None else f"{value:.4g}"
            verdict = "chosen" if c.row is self.chosen else ("accepted" if c.accepted else "rejected")
            why = f": {c.reason}" if c.reason else ""
            lines.append(f"{verdict:<8} {str(c.row['variant'])[:12]} {self.slo.objective}={shown}{why}")
        return "\n".join(lines)
