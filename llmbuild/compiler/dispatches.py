"""Dispatches of a front half: which of them are products, when two are of one kind, and how to configure one.

A configuration is attached to the product itself, before the compiler configures dispatches: the compiler keeps it and
fits the operations around it. This covers the products that a tuning spec's matchers find, and also products with
fused dequantization, and it needs no names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmbuild import digest

_EXPORT = re.compile(r"hal\.executable\.export public @([\w$.]+) ")
_OPERATION = re.compile(r"= linalg\.\w+ ")
_PRODUCT = re.compile(
    r"= linalg\.generic \{indexing_maps = \[(?P<maps>.*?)\], iterator_types = \[(?P<loops>[^\]]*)\]\} "
    r"ins\((?P<ins>[^)]*)\) outs\((?P<outs>[^)]*)\)(?P<attributes> attrs =\s*\{.*?\})? \{"
)
_MAP = re.compile(r"affine_map<\(([^)]*)\) -> \(([^)]*)\)>")
_TENSOR = re.compile(r"tensor<([0-9x?]*?)x?([a-z]+\d+)>")
_PIPELINE = "#iree_codegen.translation_info<pipeline = #iree_cpu.pipeline<DoubleTilingExpert>>"

ROWS, DEPTHS = (1, 16, 8, 4), (256, 128, 64, 16, 4)
"""Candidate sizes of the innermost parallel loop and of the reduction; two rows are known to be slow."""

VOLUME = 2048
"""Maximum elements of a tile: beyond it code is unrolled until the compiler refuses or takes minutes."""


@dataclass(frozen=True)
class Product:
    """A product with static shapes and one reduction, the only one of its dispatch.

    `name` is the dispatch's, without entry point and number. `signature` names its kind: the operations of the
    dispatch with their types, so that equal ones in other layers and models are recognized. `bounds` are its loop
    bounds, the reduction last.
    """

    name: str
    signature: str
    operations: tuple[str, ...]
    bounds: tuple[int, ...]
    line: int


def products(text: str) -> list[Product]:
    """Return the products of a front half that can be configured, in order."""
    found = []
    for name, numbered in _dispatches(text.splitlines()):
        operations = [(n, line) for n, line in numbered if _OPERATION.search(line)]
        roots = [(n, m) for n, line in operations if (m := _PRODUCT.search(line)) and _is_product(m)]
        if len(roots) == 1:
            types = tuple(_nameless(line) for _, line in operations)
            bounds = _bounds(roots[0][1])
            if bounds:
                found.append(Product(short_name(name), digest.of(types), types, bounds, roots[0][0]))
    return found


def short_name(name: str) -> str:
    """Return a dispatch's name without its entry point and number, as the profiler reports it."""
    return re.sub(r"^(?:prefill|decode|score)(?:\$async)?_dispatch_\d+_", "", name)


def _dispatches(lines: list[str]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    name, inside = "", list[tuple[int, str]]()
    for number, line in enumerate(lines):
        match = _EXPORT.search(line)
        if match:
            if name:
                yield name, inside
            name, inside = match[1], []
        inside.append((number, line))
    if name:
        yield name, inside


def _is_product(match: re.Match[str]) -> bool:
    loops = [x.strip().strip('"') for x in match["loops"].split(",")]
    return (
        loops[-1] == "reduction" and loops.count("reduction") == 1 and len(loops) > 1 and match["ins"].count("%") == 2
    )


def _nameless(line: str) -> str:
    """Return an operation without names of values and locations."""
    kept = re.sub(r" attrs =\s*\{linalg\.memoized_indexing_maps = \[.*?\]\}", "", line)
    return re.sub(r"\s*loc\(.*$", "", re.sub(r"%[\w#:]+", "%", kept)).strip()


def _bounds(match: re.Match[str]) -> tuple[int, ...]:
    """Return the loops' bounds from the shapes they index; empty where one is dynamic or indexed by an expression."""
    maps = _MAP.findall(match["maps"])
    shapes = [shape.split("x") if shape else [] for shape, _ in _TENSOR.findall(match["ins"] + match["outs"])]
    loops = [d.strip() for d in maps[0][0].split(",")]
    known: dict[str, int] = {}
    for (_, results), shape in zip(maps, shapes, strict=False):
        names = [r.strip() for r in results.split(",") if r.strip()]
        if len(names) != len(shape) or not all(size.isdigit() for size in shape):
            return ()
        known.update(zip(names, map(int, shape), strict=True))
    return tuple(known[name] for name in loops) if set(loops) <= set(known) else ()


def configurations(product: Product) -> list[str]:
    """Return the candidate configurations: tiles of the innermost parallel loop and of the reduction."""
    *parallel, depth = product.bounds
    found = []
    for rows in ROWS if parallel[-1] not in (32, 64) else (parallel[-1], *ROWS):
        for k in DEPTHS:
            if rows <= parallel[-1] and k <= depth and 16 <= rows * k <= VOLUME:
                found.append(_configuration(parallel, rows, k))
    return list(dict.fromkeys(found))


def _configuration(parallel: list[int], rows: int, k: int) -> str:
    spread = [64 if len(parallel) == 1 else 4, *parallel[1:], 0]
    tile = [*[1] * (len(parallel) - 1), rows, 0]
    reduce = [*[0] * len(parallel), k]
    return (
        f"#iree_cpu.lowering_config<distribution = {spread}, vector_common_parallel = {tile}, "
        f"vector_reduction = {reduce}>"
    )


def configure(text: str, chosen: Mapping[str, str]) -> str:
    """Return a front half with these configurations on the products of these signatures."""
    told = {
        p.line: f"lowering_config = {chosen[p.signature]}, translation_info = {_PIPELINE}"
        for p in products(text)
        if p.signature in chosen
    }
    return annotated(text, told)


def annotated(text: str, told: Mapping[int, str]) -> str:
    """Return a front half with these configurations on the products in these lines."""
    lines = text.splitlines(keepends=True)
    for number, each in told.items():
        match = _PRODUCT.search(lines[number])
        assert match is not None
        attribute = f"compilation_info = #iree_codegen.compilation_info<{each}>"
        lines[number] = _with_attribute(lines[number], match, attribute)
    return "".join(lines)


def _with_attribute(line: str, match: re.Match[str], attribute: str) -> str:
    """Return an operation with one more attribute, before its own."""
    if match["attributes"]:
        at = line.index("{", match.start("attributes")) + 1
        return f"{line[:at]}{attribute}, {line[at:]}"
    at = match.end() - 1
    return f"{line[:at]}attrs = {{{attribute}}} {line[at:]}"
