"""The loader's choice, and for every other variant the reason for its rejection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild.spec.rows import Row, reading
from llmbuild.spec.slo import Slo
from llmbuild.system.terminal import cell


@dataclass(frozen=True)
class Candidate:
    """One row of the catalog and its verdict; `reason` is empty for the chosen one."""

    row: Row
    accepted: bool
    reason: str


@dataclass(frozen=True)
class Pick:
    """The chosen row, if any; all candidates with their reasons; and the requested SLO.

    `fallbacks` are the other rows that meet the SLO here, the best first. `candidates` may be read from the catalog on
    first access.
    """

    slo: Slo
    chosen: Row | None
    candidates: Sequence[Candidate]
    nearest: Row | None = None
    distance: float = 0.0
    fallbacks: Sequence[Row] = ()

    def explain(self, limit: int | None = None) -> str:
        """Return the choice and the reasons, one line for each variant, or for the first `limit` of them."""
        bounds = ", ".join(str(b) for b in self.slo.bounds) or "no bounds"
        lines = [f"asked: {bounds}; best {self.slo.objective}{self._preferred()}"]
        told = sorted(self.candidates, key=lambda c: (not self._is_chosen(c), not c.accepted))
        for c in told[:limit]:
            value = reading(c.row, self.slo.objective)
            shown = "absent" if value is None else f"{value:.4g}"
            verdict = "chosen" if self._is_chosen(c) else ("accepted" if c.accepted else "rejected")
            why = f": {c.reason}" if c.reason else ""
            lines.append(cell(f"{verdict:<8} {str(c.row['variant'])[:12]} {self.slo.objective}={shown}{why}"))
        return "\n".join(lines)

    def _preferred(self) -> str:
        """Return what is preferred where the SLO says nothing of quality."""
        added = ", ".join(str(bound) for bound in self.slo.preferred.bounds[len(self.slo.bounds) :])
        return f"; of those as good as the model ({added}) if there are any" if added else ""

    def _is_chosen(self, candidate: Candidate) -> bool:
        return candidate.row is self.chosen
