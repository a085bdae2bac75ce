"""All knobs, narrowed by a target's support and by the pins of a recipe or `--set`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from llmbuild.errors import InputError
from llmbuild.kernels.layouts import FORMATS as OWN_FORMATS
from llmbuild.search.knobs import cpu, gpu, model, program
from llmbuild.search.knobs.refusals import CALIBRATED, OWN, Refusal
from llmbuild.search.knobs.traps import broken
from llmbuild.spec.formats import SAME
from llmbuild.spec.recipe import Recipe
from llmbuild.spec.space import TUNING, Condition, Knob, Space, Value
from llmbuild.spec.target import Target

ALL: tuple[Knob, ...] = (*model.KNOBS, *program.KNOBS, *cpu.KNOBS, *gpu.KNOBS)
"""In the order of selection; a condition names an earlier knob."""

OF_OWN = frozenset(knob.name for knob in ALL if Condition("kernel", (OWN,)) in knob.when)
"""Knobs of llmbuild's kernels: without them they have no effect."""

EVERYTHING = "all"
"""The value of a knob in a recipe or `--set` that searches its whole domain."""


def knobs_of(backend: str) -> tuple[Knob, ...]:
    """Return the knobs that apply to a backend."""
    found = {k.name for k in ALL if not k.backends or backend in k.backends}
    return tuple(_without_absent(k, found) for k in ALL if not k.backends or backend in k.backends)


def _without_absent(knob: Knob, found: set[str]) -> Knob:
    """Return the knob without the conditions on knobs that the backend does not have."""
    return replace(knob, when=tuple(c for c in knob.when if c.knob in found))


def target_knobs(target: Target) -> tuple[Knob, ...]:
    """Return the knobs that apply to a target, with the part of each domain that is searched for it.

    Raises:
        InputError: the target narrows an unknown knob, or names a value outside its domain.
    """
    known = (k for k in knobs_of(target.backend) if not (target.attribute and k.name in DESCRIBED))
    there = tuple(_unbroken(knob, target) for knob in known)
    for name, _ in target.knobs:
        _check_known(name, target, {knob.name for knob in there})
    narrowed = {k.name: tuple(_value(k, v) for v in dict(target.knobs).get(k.name, ())) for k in there}
    return tuple(replace(k, searched=narrowed[k.name] or k.searched) for k in there)


COMPILER = ("compiler",)
"""Which code generator makes the products that none of llmbuild's kernels supports."""


def _unbroken(knob: Knob, target: Target) -> Knob:
    bad = broken(target.backend, knob.name)
    return replace(knob, domain=tuple(v for v in knob.domain if v not in bad)) if bad else knob


DESCRIBED = ("ptx", "dispatch_abi")
"""Knobs whose flags the compiler reads only where it describes the chip itself."""

KNOBS: tuple[Knob, ...] = knobs_of("llvm-cpu")
"""Those of this host's backend."""


def space_for(
    target: Target, recipe: Recipe, pinned: Mapping[str, str], cores: int = 2, refused: Sequence[Refusal] = ()
) -> Space:
    """Return the space of a recipe on a target; `pinned` holds the `--set KNOB=VALUE` options, which take precedence.

    `cores` is the expected number of workers where the artifacts run: llmbuild's kernels are cut into that many
    pieces. `refused` holds the values that the model does not support.

    Raises:
        InputError: an unknown knob, a value outside its domain, one that the target or the model does not support, or
            a pin whose conditions another one excludes.
    """
    there = target_knobs(target)
    names = {knob.name for knob in there}
    asked = _applicable(recipe, target, there)
    if "work_groups" in names:
        asked = {"work_groups": (work_groups(cores),), **asked}
    asked.update({name: (text,) for name, text in pinned.items()})
    for name in asked:
        _check_known(name, target, names)
        for value, why in broken(target.backend, name).items():
            if str(value) in map(str, asked[name]):
                raise InputError(f"knob {name}={value}: not on {target.backend}, where {why}")
    knobs = [_calibrated(knob, recipe, asked.get(knob.name)) for knob in there]
    own = [_own(knob, target, asked, recipe.batch) for knob in knobs]
    fitting = [_fitting(knob, refused, asked) for knob in own]
    able = {knob.name: _able(knob, target) for knob in fitting}
    narrowed = {knob.name: _narrow(knob, target, asked.get(knob.name)) for knob in fitting}
    said = {name: False for name, values in asked.items() if len(values) == 1 and name in dict(recipe.knobs)}
    said |= dict.fromkeys(pinned, True)
    for name in reversed(narrowed):  # a condition names an earlier knob, which may have conditions of its own
        if name in said:
            held = _hold(narrowed[name], narrowed, able, {*asked, *said}, said[name])
            said |= {other: said.get(other, False) or said[name] for other in held}
    return Space(tuple(narrowed.values()))


def _fitting(knob: Knob, refused: Sequence[Refusal], asked: dict[str, tuple[Value, ...]]) -> Knob:
    """Return the knob without unsupported values of the model, and with conditions for partly supported ones.

    Such values are removed from a request that names other values too.

    Raises:
        InputError: the request names only such values.
    """
    mine = [refusal for refusal in refused if refusal.knob == knob.name and refusal.value in knob.domain]
    if not mine:
        return knob
    out = {refusal.value for refusal in mine if not refusal.beside}
    only = {v.lower() for v in map(str, asked.get(knob.name, ()))} - {EVERYTHING}
    for refusal in mine:
        named = only and only <= {*(str(v).lower() for v in out), str(refusal.value).lower()}
        if named and all(set(map(str, asked.get(other, ()))) == {value} for other, value in refusal.beside):
            raise InputError(f"knob {refusal}")
    if only:  # of several values that a recipe names, the others are left
        asked[knob.name] = tuple(v for v in asked[knob.name] if str(v).lower() not in {str(o).lower() for o in out})
    beside = {pair for refusal in mine for pair in refusal.beside}
    when = (replace(c, values=tuple(v for v in c.values if (c.knob, v) not in beside)) for c in knob.when)
    return replace(knob, domain=tuple(v for v in knob.domain if v not in out), when=tuple(when))


def _hold(
    knob: Knob,
    knobs: dict[str, Knob],
    able: Mapping[str, Sequence[Value]],
    asked: Collection[str],
    pinned: bool,
) -> list[str]:
    """Narrow, in place, the knobs in a knob's conditions, so that every point has the requested value; return them.

    A recipe's own values of those knobs take precedence where only the recipe requests the knob, as long as some of
    them meet the condition. `able` holds the values of each knob that the target and the model support.

    Raises:
        InputError: no requested value meets the condition.
    """
    held = []
    for condition in () if knob.default in knob.domain else knob.when:
        other = knobs[condition.knob]
        domain = other.domain if other.name in asked else (*other.domain, *able[other.name])
        meets = tuple(dict.fromkeys(v for v in domain if v in condition.values))
        searched = tuple(v for v in meets if v in other.domain)
        if not meets:
            told, wanted = ", ".join(map(str, knob.domain)), " or ".join(map(str, condition.values))
            found = ", ".join(map(str, other.domain))
            raise InputError(
                f"knob {knob.name}={told} needs {other.name} to be {wanted or 'something else'}, not {found}"
            )
        if pinned or other.name not in asked:
            knobs[other.name] = replace(other, domain=searched or meets)
            held.append(other.name)
    return held


def _applicable(recipe: Recipe, target: Target, there: Sequence[Knob]) -> dict[str, tuple[Value, ...]]:
    """Return a recipe's values for the knobs of a target: a recipe may also name other backends' knobs.

    Raises:
        InputError: a knob that no backend has.
    """
    mine, said = {k.name: k for k in there}, {}
    of_cpus = dict(for_cpus(recipe, target))
    for name, values in recipe.knobs:
        if name in of_cpus:
            continue
        others = [k for k in ALL if k.name == name and target.backend not in (k.backends or (target.backend,))]
        if not others or name in mine:
            foreign = {str(v).lower() for k in others for v in k.domain}
            kept = tuple(v for v in values if str(v).lower() not in foreign or _has(mine[name], v))
            if kept or not others:
                said[name] = kept or values
    return said


def for_cpus(recipe: Recipe, target: Target) -> dict[str, tuple[Value, ...]]:
    """Return a recipe's values that serve llmbuild's CPU kernels and are dropped on another target.

    A recipe that names only them as `kernel` narrows the formats, layout and cache for them, unless it names the
    layout that llmbuild's GPU kernels read.
    """
    said = dict(recipe.knobs)
    for_gpus = "row_major" in map(str, said.get("layout", ()))
    if target.is_cpu or for_gpus or not _only_own(said):
        return {}
    with_them = {"kernel", *(c.knob for k in ALL if k.name == "kernel" for c in k.when)}
    return {name: values for name, values in said.items() if name in with_them}


def _only_own(asked: Mapping[str, Sequence[Value]]) -> bool:
    """Return whether only llmbuild's kernels are requested."""
    return set(map(str, asked.get("kernel", ()))) == {OWN}


def _has(knob: Knob, given: Value) -> bool:
    return str(given).lower() in {str(v).lower() for v in (*knob.domain, EVERYTHING)}


def _check_known(name: str, target: Target, known: set[str]) -> None:
    elsewhere = sorted({b for k in ALL if k.name == name for b in k.backends})
    if elsewhere and name not in known:
        raise InputError(f"knob {name} is for {', '.join(elsewhere)}; target {target.name} is {target.backend}")
    if name not in known:
        raise InputError(f"unknown knob {name!r}; there are {', '.join(sorted(known))}")


def with_tuning(space: Space, name: str, pinned: Collection[str]) -> Space:
    """Return the space with configurations of a catalog, by name, besides the compiler's own."""
    if not name or TUNING in pinned:
        return space
    return Space(tuple(replace(k, domain=(*k.domain, name)) if k.name == TUNING else k for k in space.knobs))


def work_groups(cores: int) -> int:
    """Return the smallest number of pieces that uses every core."""
    pieces = [int(v) for k in KNOBS if k.name == "work_groups" for v in k.domain]
    return next((n for n in pieces if n >= cores), pieces[-1])


def _calibrated(knob: Knob, recipe: Recipe, asked: Sequence[Value] | None) -> Knob:
    """Return the knob without the values that need calibration text, where there is none.

    Raises:
        InputError: such a value was requested.
    """
    needing = [value for name, value in CALIBRATED if name == knob.name]
    if not needing or (recipe.calibration and not recipe.model.random_init):
        return knob
    if refused := [value for value in needing if str(value) in map(str, asked or ())]:
        why = "random weights have no text to be calibrated on" if recipe.model.random_init else "the recipe names none"
        raise InputError(f"knob {knob.name}={refused[0]} needs calibration text, and {why}")
    return replace(knob, domain=tuple(v for v in knob.domain if v not in needing))


def _own(knob: Knob, target: Target, asked: Mapping[str, Sequence[Value]], batch: int) -> Knob:
    """Return the knob of llmbuild's kernels for the formats that they support on a target; other knobs unchanged.

    Raises:
        InputError: only llmbuild's kernels are requested, and they support none of the formats requested there, or
            they serve one sequence and more were requested.
    """
    if knob.name != "kernel":
        return knob
    if batch > 1:
        if _only_own(asked):
            raise InputError(
                f"knob kernel=own: our kernels answer one sequence at a time, the workloads {batch}: choose "
                "kernel=compiler"
            )
        return replace(knob, domain=COMPILER)
    if not target.is_cpu:
        return knob
    from llmbuild.kernels.choose import needs, readable  # the kernels themselves, which a listing does without

    formats = readable(target.requires)
    wanted = [form for form in map(str, asked.get("weight_format", OWN_FORMATS)) if form in OWN_FORMATS]
    if _only_own(asked) and wanted and not set(wanted) & set(formats):
        raise InputError(f"knob kernel=own: target {target.name} lacks {needs(wanted[0])} for {wanted[0]}")
    if not formats:
        return replace(knob, domain=COMPILER)
    allowed = {"weight_format": formats, "head_format": (SAME, *formats)}
    return replace(knob, when=tuple(Condition(c.knob, allowed.get(c.knob, c.values)) for c in knob.when))


def _able(knob: Knob, target: Target) -> tuple[Value, ...]:
    needs = dict(knob.features)
    return tuple(v for v in knob.domain if set(needs.get(v, ())) <= set(target.requires))


def _narrow(knob: Knob, target: Target, asked: Sequence[Value] | None) -> Knob:
    needs, able = dict(knob.features), _able(knob, target)
    if asked is None:
        return replace(knob, domain=tuple(v for v in able if v in knob.searched) if knob.searched else able)
    chosen = able if tuple(asked) == (EVERYTHING,) and EVERYTHING not in able else tuple(_value(knob, v) for v in asked)
    for value in chosen:
        if value not in able:
            raise InputError(
                f"knob {knob.name}={value}: target {target.name} lacks {' '.join(needs.get(value, ()))}; "
                f"choose from {', '.join(str(v) for v in able)}"
            )
    return replace(knob, domain=tuple(dict.fromkeys(chosen)))


def _value(knob: Knob, given: Value) -> Value:
    """Return the value of the domain that `given` names; the command line gives text only."""
    for value in knob.domain:
        same_kind = isinstance(given, bool) == isinstance(value, bool)
        if (given == value and same_kind) or str(given).lower() == str(value).lower():
            return value
    raise InputError(f"knob {knob.name}={given}: choose from {', '.join(str(v) for v in knob.domain)}")
