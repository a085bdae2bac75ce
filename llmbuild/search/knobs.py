"""The knobs there are, narrowed by what a target can do and what a recipe or `--set` pins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llmbuild.errors import InputError
from llmbuild.kernels.choose import needs, readable
from llmbuild.kernels.layouts import FORMATS as OWN_FORMATS
from llmbuild.spec.formats import INTEGERS, SAME, WEIGHT_FORMATS
from llmbuild.spec.recipe import Recipe
from llmbuild.spec.space import Condition, Knob, Space, Value
from llmbuild.spec.target import Target

KNOBS: tuple[Knob, ...] = (
    Knob(
        "weight_format",
        "model",
        WEIGHT_FORMATS,
        "f32",
        "type of the weight matrices; _gN: a scale for each N inputs of a row, else for the row; int4a: with zeros",
        searched=("f32", "f16", "int8", "int4_g128", "int4a_g64"),
    ),
    Knob(
        "head_format",
        "model",
        (SAME, *WEIGHT_FORMATS),
        SAME,
        "type of the output matrix and the token table",
        searched=(SAME, "int8"),
    ),
    Knob(
        "quantization",
        "model",
        ("rtn", "gptq"),
        "rtn",
        "how weights become integers: each to the nearest, or for the calibration text",
        when=(Condition("weight_format", tuple(INTEGERS)),),
    ),
    Knob(
        "scaling",
        "model",
        ("none", "activation"),
        "none",
        "scale channels between layers so that rounding them costs less on the calibration text",
        when=(Condition("weight_format", tuple(INTEGERS)),),
    ),
    Knob(
        "mixed",
        "model",
        ("none", "sensitive"),
        "none",
        "keep the quarter of the weights in int8 whose rounding the calibration text shows most",
        when=(Condition("weight_format", tuple(name for name, form in INTEGERS.items() if form.bits == 4)),),
    ),
    Knob(
        "kv_dtype",
        "model",
        ("f32", "f16", "int8"),
        "f32",
        "element type of the KV cache; int8 has a scale for each position and head",
    ),
    Knob("layout", "model", ("row_major", "packed"), "row_major", "order of the weights in the parameter archive"),
    Knob(
        "kernel",
        "model",
        ("compiler", "own"),
        "compiler",
        "who generates the matrix products: IREE, or our MLIR kernels",
        when=(
            Condition("weight_format", OWN_FORMATS),
            Condition("head_format", (SAME, *OWN_FORMATS)),
            Condition("mixed", ("none",)),
            Condition("kv_dtype", ("f32", "f16")),
            Condition("layout", ("packed",)),
        ),
    ),
    Knob(
        "work_groups",
        "model",
        (1, 2, 4, 8, 16, 32, 64),
        1,
        "pieces our kernels cut a layer into; one for each worker is enough",
        when=(Condition("kernel", ("own",)),),
    ),
    Knob("opt_level", "codegen", ("O0", "O1", "O2", "O3"), "O0", "--iree-opt-level"),
    Knob(
        "data_tiling",
        "codegen",
        ("off", "dispatch", "global"),
        "off",
        "let the compiler pack the weights when the module is loaded",
        when=(Condition("kernel", ("compiler",)), Condition("layout", ("row_major",))),
    ),
    Knob("split_reduction", "codegen", (False, True), False, "split long reductions into two dispatches"),
    Knob("distribution_size", "codegen", (64, 16, 32, 128), 64, "rows a work-group takes"),
    Knob(
        "driver", "runtime", ("local-task", "local-sync"), "local-task", "IREE's CPU driver: threads, or the caller's"
    ),
    Knob(
        "workers",
        "runtime",
        (0, 1),
        0,
        "worker threads; 0 is one for each physical core",
        when=(Condition("driver", ("local-task",)),),
    ),
)
"""In the order in which they are asked about; a condition names an earlier knob."""

CALIBRATED = {"quantization": "gptq", "scaling": "activation", "mixed": "sensitive"}
"""Values that need calibration text."""


def space_for(target: Target, recipe: Recipe, pinned: Mapping[str, str], cores: int = 2) -> Space:
    """Return the space of a recipe on a target; `pinned` holds the `--set KNOB=VALUE` options, which win.

    `cores` is how many workers are expected where the artifacts will run: our kernels are cut into that many pieces.

    Raises:
        InputError: an unknown knob, a value outside its domain, or one the target cannot do.
    """
    asked: dict[str, tuple[Value, ...]] = {"work_groups": (work_groups(cores),), **dict(recipe.knobs)}
    asked.update({name: (text,) for name, text in pinned.items()})
    known = {knob.name for knob in KNOBS}
    for name in asked:
        if name not in known:
            raise InputError(f"unknown knob {name!r}; there are {', '.join(sorted(known))}")
    knobs = [_calibrated(knob, recipe, asked.get(knob.name)) for knob in KNOBS]
    return Space(tuple(_narrow(_own(knob, target, asked), target, asked.get(knob.name)) for knob in knobs))


def work_groups(cores: int) -> int:
    """Return the smallest number of pieces that keeps every core busy."""
    pieces = [int(v) for k in KNOBS if k.name == "work_groups" for v in k.domain]
    return next((n for n in pieces if n >= cores), pieces[-1])


def _calibrated(knob: Knob, recipe: Recipe, asked: Sequence[Value] | None) -> Knob:
    """Return the knob without the value that needs calibration text, where there is none.

    Raises:
        InputError: that value was asked for.
    """
    needing = CALIBRATED.get(knob.name)
    if needing is None or (recipe.calibration and not recipe.model.random_init):
        return knob
    if asked is not None and needing in map(str, asked):
        why = "random weights have no text to be calibrated on" if recipe.model.random_init else "the recipe names none"
        raise InputError(f"knob {knob.name}={needing} needs calibration text, and {why}")
    return replace(knob, domain=tuple(v for v in knob.domain if v != needing))


def _own(knob: Knob, target: Target, asked: Mapping[str, Sequence[Value]]) -> Knob:
    """Return the knob of our kernels for the formats that they read on a target; other knobs as they are.

    Raises:
        InputError: our kernels are all that was asked for, and they read none of the formats asked for there.
    """
    if knob.name != "kernel":
        return knob
    formats = readable(target.requires)
    wanted = [form for form in map(str, asked.get("weight_format", OWN_FORMATS)) if form in OWN_FORMATS]
    if set(map(str, asked.get("kernel", ()))) == {"own"} and wanted and not set(wanted) & set(formats):
        raise InputError(f"knob kernel=own: target {target.name} lacks {needs(wanted[0])} for {wanted[0]}")
    allowed = {"weight_format": formats, "head_format": (SAME, *formats)}
    when = tuple(Condition(c.knob, allowed.get(c.knob, c.values)) for c in knob.when)
    return replace(knob, when=when, domain=knob.domain if formats else ("compiler",))


def _narrow(knob: Knob, target: Target, asked: Sequence[Value] | None) -> Knob:
    needs = dict(knob.features)
    able = tuple(v for v in knob.domain if set(needs.get(v, ())) <= set(target.requires))
    if asked is None:
        return replace(knob, domain=tuple(v for v in able if v in knob.searched) if knob.searched else able)
    chosen = tuple(_value(knob, v) for v in asked)
    for value in chosen:
        if value not in able:
            raise InputError(
                f"knob {knob.name}={value}: target {target.name} lacks {' '.join(needs.get(value, ()))}; "
                f"choose from {', '.join(str(v) for v in able)}"
            )
    return replace(knob, domain=tuple(dict.fromkeys(chosen)))


def _value(knob: Knob, given: Value) -> Value:
    """Return the value of the domain that `given` says; the command line gives text only."""
    for value in knob.domain:
        same_kind = isinstance(given, bool) == isinstance(value, bool)
        if (given == value and same_kind) or str(given).lower() == str(value).lower():
            return value
    raise InputError(f"knob {knob.name}={given}: choose from {', '.join(str(v) for v in knob.domain)}")
