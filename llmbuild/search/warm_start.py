"""The first points of a search: point 0, then the best points of related models and targets, and of other hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmbuild.search.knobs.gpu import FIRST, GPU_DRIVERS
from llmbuild.spec.space import Point, Space, Value

RELATED = 6
"""Maximum number of points of related fronts that are tried first."""

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
"""Points that are good on other models and hosts, tried right after point 0.

Neighbours that share an import follow each other, since an import costs the most.
"""

WITHOUT_OWN: tuple[dict[str, Value], ...] = (
    {},
    {"weight_format": "f16", "layout": "packed", "opt_level": "O2", **_SYNC},
    {"opt_level": "O2", "data_tiling": "dispatch"},
)
"""The same for a model or target without llmbuild's kernels."""

DISPENSABLE = ("scaling",)
"""Knobs that a point of the warm start drops where the space lacks the value."""

STORED = ("weight_format", "head_format", "quantization", "kv_dtype")
"""Knobs of the storage formats: a pin replaces the value of a warm start's point."""


def _warm_start(domains: Mapping[str, Sequence[Value]]) -> Sequence[dict[str, Value]]:
    """Return the first points for a space with these domains."""
    if set(domains.get("driver", ())) & set(GPU_DRIVERS):
        there = [{k: v for k, v in values.items() if v in domains.get(k, ())} for values in FIRST]
        return [values for values in there if "weight_format" in values]
    return WARM_START if "own" in domains.get("kernel", ()) else WITHOUT_OWN


def initial_points(space: Space, related: Sequence[dict[str, Value]] = ()) -> list[Point]:
    """Return the points that precede the sampler's.

    Point 0, then those of related models and targets, then the warm start, as far as the space allows each, and the
    point of the narrowed space itself. All but point 0 have every pin of the space.
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
