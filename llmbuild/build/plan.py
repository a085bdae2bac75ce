"""The dry run of a build: each step as Fresh, or Stale with the changed fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmbuild import digest
from llmbuild.build.freshness import Freshness
from llmbuild.build.job import Job
from llmbuild.build.trials import describe
from llmbuild.catalog.known import Known
from llmbuild.search.knobs.refusals import Refusal
from llmbuild.spec.program import Program
from llmbuild.spec.recipe import Budget, Recipe
from llmbuild.spec.variant import Artifact

Inputs = Mapping[str, object]


@dataclass(frozen=True)
class Planned:
    """One step, its object, and why it is stale; an empty reason means fresh."""

    step: str
    what: str
    reason: str
    key: str = ""

    def row(self) -> dict[str, object]:
        """Return a line of `-n`."""
        return {
            "step": self.step,
            "what": self.what,
            "state": "stale" if self.reason else "fresh",
            "reason": self.reason,
        }


STEPS = ("import", "compile", "profile", "search")


def until(planned: list[Planned], step: str | None) -> list[Planned]:
    """Return a plan up to and including a step; the profiling of point 0 stands for all points."""
    last = {"profile": "search"}.get(step or "", step or "search")
    return planned[: STEPS.index(last) + 1]


def plan(job: Job, catalog: Known | None, budget: Budget, seed: int) -> list[Planned]:
    """Return the steps of a build in order; without a catalog all are stale."""
    zero = describe(job, job.space.default())
    if catalog is None:
        reason = "no catalog yet"
        return [Planned(s, zero, reason) for s in ("import", "compile", "profile")] + [_search(0, budget, reason)]
    default = job.space.default()
    changed = changes(job, catalog)
    import_key, compile_key = digest.of(job.import_inputs(default)), ""
    program = catalog.find_import(import_key)
    if program:
        compile_key = digest.of(job.compile_inputs(program, default))
    artifact = catalog.find_compile(compile_key) if program else None
    if job.force:
        return [Planned(s, zero, FORCED) for s in STEPS[:3]] + [_search(0, budget, FORCED)]
    look = Freshness(job, catalog, budget, seed)
    search, known = look.plan(), look.finished
    if changed and not known:
        search = changed
    return [
        Planned("import", zero, "" if program else changed or "never imported", import_key),
        Planned("compile", zero, _compile_reason(program, artifact), compile_key),
        Planned("profile", zero, "" if any(f.is_default for f in known) else changed or "never measured", job.scope),
        _search(sum(not f.reused for f in known), budget, search),
    ]


FORCED = "-B asks for it"


def left_out(recipe: Recipe, refused: Sequence[Refusal]) -> list[Refusal]:
    """Return the values in a recipe's space that the model does not support."""
    said = dict(recipe.knobs)
    open_ = [r for r in refused if r.value in said.get(r.knob, (r.value,))]
    return [r for r in open_ if all(value in said.get(knob, (value,)) for knob, value in r.beside)]


def _compile_reason(program: Program | None, artifact: Artifact | None) -> str:
    if program is None:
        return "its program is stale"
    return "" if artifact else "never compiled with these flags and this compiler"


def explained(job: Job, catalog: Known | None) -> dict[str, list[object]]:
    """Return each field of the key that differs from the latest build of this recipe, with its old and new value."""
    earlier = catalog.last_inputs(job.recipe.name) if catalog else []
    if not earlier or job.scope_inputs in earlier:
        return {}
    was, mine = _by_field(job, catalog, earlier[0])
    return {name: [_field(was, name), _field(mine, name)] for name in sorted(_differing(mine, was))}


def _by_field(job: Job, catalog: Known | None, earlier: Inputs) -> tuple[Inputs, Inputs]:
    """Return the old and the new key of a build, with machines by field instead of by digest."""
    was, mine = earlier, job.scope_inputs
    there = catalog.machine(str(earlier.get("machine"))) if catalog else None
    if there is None or there == job.machine:
        return was, mine
    return {**was, "machine": there.fields()}, {**mine, "machine": job.machine.fields()}


def _field(inputs: Inputs, name: str) -> object:
    """Return a field by its dotted name; field names contain no dots."""
    found: object = inputs
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def changes(job: Job, catalog: Known) -> str:
    """Return which fields differ from the latest build of this recipe; empty when a build has the same key."""
    mine: Inputs = job.scope_inputs
    earlier = catalog.last_inputs(job.recipe.name)
    if not earlier:
        return "never built"
    if any(inputs == mine for inputs in earlier):
        return ""
    was, mine = _by_field(job, catalog, earlier[0])
    fields = sorted(_differing(mine, was))
    return "changed: " + ", ".join(fields)


def _differing(a: Inputs, b: Inputs, prefix: str = "") -> list[str]:
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
