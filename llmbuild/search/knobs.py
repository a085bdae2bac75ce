"""The knobs there are, narrowed by what a target can do and what a recipe or `--set` pins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llmbuild.errors import InputError
from llmbuild.spec.recipe import Recipe
from llmbuild.spec.space import Condition, Knob, Space, Value
from llmbuild.spec.target import Target

KNOBS: tuple[Knob, ...] = (
    Knob("weight_format", "model", ("f32", "f16", "int8"), "f32", "element type of the weight matrices"),
    Knob("layout", "model", ("row_major", "packed"), "row_major", "order of the weights in the parameter archive"),
    Knob(
        "kernel",
        "model",
        ("compiler", "own"),
        "compiler",
        "who generates the matrix products: IREE, or our MLIR kernels",
        when=(Condition("weight_format", ("int8",)), Condition("layout", ("packed",))),
        features=(("own", ("avx2", "fma")),),
    ),
    Knob(
        "work_groups",
        "model",
        (1, 2, 4, 8, 16, 32, 64),
        1,
        "pieces our kernels cut a layer into; one for each worker is enough",
        when=(Condition("kernel", ("own",)),),
    ),
    Knob("kv_dtype", "model", ("f32", "f16"), "f32", "element type of the KV cache"),
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
    return Space(tuple(_narrow(knob, target, asked.get(knob.name)) for knob in KNOBS))


def work_groups(cores: int) -> int:
    """Return the smallest number of pieces that keeps every core busy."""
    pieces = [int(v) for k in KNOBS if k.name == "work_groups" for v in k.domain]
    return next((n for n in pieces if n >= cores), pieces[-1])


def _narrow(knob: Knob, target: Target, asked: Sequence[Value] | None) -> Knob:
    needs = dict(knob.features)
    able = tuple(v for v in knob.domain if set(needs.get(v, ())) <= set(target.requires))
    if asked is None:
        return replace(knob, domain=able)
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
