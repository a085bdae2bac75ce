"""The points that a search begins with: point 0, then what did well on related models and targets and elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmbuild.search.knobs.gpu import FIRST, GPU_DRIVERS
from llmbuild.spec.space import Point, Space, Value

RELATED = 6
"""Points of related fronts that are tried first, at most."""

_OWN: dict[str, Value] = {
    "weight_format": "int8",
    "scaling": "activation",
    "layout": "packed",
    "kernel": "own",
    "opt_level": "O2",
}

_OWN_INT4: dict[str, Value] = {**_OWN, "weight_format": "int4_g128", "head_format": "int8", "quantization": "gptq"}
_SYNC: dict[str, Value] = {"driver": "local-sync"}

WARM_START: tuple[dict[str, Value], ...] = (
    _OWN,
    {**_OWN, **_SYNC},
    {**_OWN, "weight_format": "f16", **_SYNC},
    {**_OWN, "weight_format": "f16"},
    _OWN_INT4,
    {**_OWN_INT4, **_SYNC},
)
"""Points that did well on other models and hosts, tried right after point 0.

Neighbours that share an import follow each other, for an import costs the most.
"""

WITHOUT_OWN: tuple[dict[str, Value], ...] = (
    {},
    {"weight_format": "f16", "layout": "packed", "opt_level": "O2", **_SYNC},
    {"opt_level": "O2", "data_tiling": "dispatch"},
)
"""The same where there is no kernel of ours."""

DISPENSABLE = ("scaling",)
"""Knobs whose value a point of the warm start goes without where the space lacks it."""

STORED = ("weight_format", "head_format", "quantization", "kv_dtype")
"""Knobs that are pinned for what is to be stored: a point of the warm start takes a pin of them in place of its own."""


def _warm_start(domains: Mapping[str, Sequence[Value]]) -> Sequence[dict[str, Value]]:
    """Return the points to begin with where a space has these domains."""
    if set(domains.get("driver", ())) & set(GPU_DRIVERS):
        there = [{k: v for k, v in values.items() if v in domains.get(k, ())} for values in FIRST]
        return [values for values in there if "weight_format" in values]
    return WARM_START if "own" in domains.get("kernel", ()) else WITHOUT_OWN


def initial_points(space: Space, related: Sequence[dict[str, Value]] = ()) -> list[Point]:
    """Return what is tried before a sampler knows anything: point 0, then what did well on related models and targets,
    then the warm start, as far as the space allows each, and what the space itself says where it is narrowed.

    All but point 0 have every pin of the space.
    """
    default = space.default()
    domains = {k.name: k.domain for k in space.knobs}
    settled = {name: default[name] if default[name] in domain else domain[0] for name, domain in domains.items()}
    pinned = {name: settled[name] for name in STORED if name in domains and default[name] not in domains[name]}
    points = [default]
    for values in (*related[:RELATED], *_warm_start(domains), {}):
        said = {k: v if v in domains.get(k, ()) else pinned.get(k, v) for k, v in values.items()}
        wanted = {k: v for k, v in said.items() if k in domains and (k not in DISPENSABLE or v in domains[k])}
        point = space.complete({**settled, **wanted})
        if all(point[name] in domain or point[name] == default[name] for name, domain in domains.items()):
            points.append(point)
    return list(dict.fromkeys(points))
