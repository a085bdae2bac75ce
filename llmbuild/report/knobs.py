"""The search space as rows: every knob, and what is left out on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmbuild.search.knobs import ALL, target_knobs
from llmbuild.search.traps import BROKEN, TRAPS, Trap
from llmbuild.spec.space import Knob
from llmbuild.spec.target import Target


def knob_rows(target: Target | None) -> list[dict[str, Any]]:
    """Return the knobs, of one target if it is named, then what is left out of the space on purpose."""
    traps = (*TRAPS, *(Trap(f"{b.knob}={b.value}", b.backends, b.reason) for b in BROKEN))
    if target is None:
        return [*map(_knob_row, ALL), *map(_trap_row, traps)]
    mine = [t for t in traps if not t.backends or target.backend in t.backends]
    return [*map(_knob_row, target_knobs(target)), *map(_trap_row, mine)]


_LEVELS = {"model": "A model", "codegen": "B code generation", "runtime": "C run time"}


def _knob_row(k: Knob) -> dict[str, Any]:
    searched = f" (searched: {_words(k.searched)})" if k.searched and k.searched != k.domain else ""
    return {
        "knob": k.name,
        "level": _LEVELS[k.level],
        "backends": " ".join(k.backends) or "all",
        "default": k.default,
        "domain": _words(k.domain) + searched,
        "when": "; ".join(f"{c.knob} in {_words(c.values)}" for c in k.when),
        "meaning": k.meaning,
    }


def _trap_row(trap: Trap) -> dict[str, Any]:
    excluded = {"knob": trap.choice, "level": "excluded", "backends": " ".join(trap.backends) or "all"}
    return {**excluded, "default": "", "domain": "", "when": "", "meaning": trap.reason}


def _words(values: Sequence[Any]) -> str:
    return " ".join(str(v) for v in values)
