"""What a build would do and why, without doing it: each step with Fresh, or Stale and the reason by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmbuild import digest
from llmbuild.build import Build, describe, known_trials, stale_reason, unique
from llmbuild.catalog.writer import Catalog
from llmbuild.spec.recipe import Budget
from llmbuild.steps import Job, Steps


@dataclass(frozen=True)
class Planned:
    """One step, what it is about, and why it is stale; an empty reason means fresh."""

    step: str
    what: str
    reason: str

    def row(self) -> dict[str, Any]:
        """Return what `-n` prints."""
        return {
            "step": self.step,
            "what": self.what,
            "state": "stale" if self.reason else "fresh",
            "reason": self.reason,
        }


def plan(job: Job, catalog: Catalog | None, budget: Budget, seed: int) -> list[Planned]:
    """Return the steps of a build in order; without a catalog yet, all of them are to be done."""
    zero = describe(job, job.space.default())
    if catalog is None:
        reason = "no catalog yet"
        return [Planned(s, zero, reason) for s in ("import", "compile", "profile")] + [_search(0, budget, reason)]
    steps = Steps(job, catalog)
    changed = changes(job, catalog)
    program = None if job.force else catalog.find_import(digest.of(steps.import_inputs(job.space.default())))
    artifact = catalog.find_compile(digest.of(steps.compile_inputs(program, job.space.default()))) if program else None
    known = [] if job.force else known_trials(steps)
    reason = "-B asks for it" if job.force else changed
    done = Build(steps, budget, seed, 1, lambda _: None) if not job.force else None
    search = stale_reason(done) if done else "-B asks for it"
    if changed and not known:
        search = changed
    return [
        Planned("import", zero, "" if program else reason or "never imported"),
        Planned("compile", zero, "" if artifact else ("its program is stale" if not program else "never compiled")),
        Planned("profile", zero, "" if any(t.is_default for t in known) else reason or "never measured"),
        _search(unique(known), budget, search),
    ]


def changes(job: Job, catalog: Catalog) -> str:
    """Return which fields differ from the latest build of this recipe; empty when one had the very same."""
    mine = job.scope_inputs
    earlier = catalog.last_inputs(job.recipe.name)
    if not earlier:
        return "never built"
    if any(inputs == mine for inputs in earlier):
        return ""
    fields = sorted(_differing(mine, earlier[0]))
    return "changed: " + ", ".join(fields)


def _differing(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in {*a, *b}:
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differing(left, right, f"{prefix}{name}.")
        elif left != right:
            found.append(prefix + name)
    return found


def _search(known: int, budget: Budget, reason: str) -> Planned:
    return Planned("search", f"{known} of {budget.trials} trials known", reason)
