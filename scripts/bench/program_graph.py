"""Programs as graphs for cost models: a node for each operator with its shape, its bytes and its configuration.

`of_operators` draws the graph from a model's sizes and a point's choices, before anything is imported: the operators
of a decode step or a prefill, those of a layer once with the number of layers as their count. `of_dispatches` reads it
from a front half of a compile: a node for each executable, counted as often as it is dispatched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmbuild.spec.formats import INTEGERS, SAME, bits, in_panels
from llmbuild.spec.model import ModelFacts
from llmbuild.spec.space import Value

Array = NDArray[np.float64]

KINDS = ("look", "norm", "product", "head", "rope", "attention", "activation", "add", "quantize")
"""Kinds of operators in a drawn graph."""


@dataclass(frozen=True)
class Node:
    """An operator: its numbers are per occurrence, `count` occurrences in a step."""

    kind: str
    count: int
    weight_bytes: float
    other_bytes: float
    flops: float
    rows: int
    columns: int
    depth: int

    def numbers(self) -> list[float]:
        """Return the features of an operator: one-hot kind, then logarithms."""
        hot = [float(self.kind == kind) for kind in KINDS]
        sizes = (self.weight_bytes, self.other_bytes, self.flops, self.rows, self.columns, self.depth)
        return [*hot, *(math.log1p(size) for size in sizes)]


@dataclass(frozen=True)
class Graph:
    """Features f64[N,F] and counts f64[N] of nodes, and edges from producers to consumers i64[E,2]."""

    features: Array
    counts: Array
    edges: tuple[tuple[int, int], ...]


def of_operators(facts: ModelFacts, choices: Mapping[str, Value], tokens: int, position: int) -> Graph:
    """Return the operators of a step of `tokens` tokens, the last of them at `position`."""
    nodes, edges = _Drawing(facts, choices, tokens, position).whole()
    return Graph(np.array([n.numbers() for n in nodes]), np.array([float(n.count) for n in nodes]), tuple(edges))


class _Drawing:
    """A graph in the making."""

    def __init__(self, facts: ModelFacts, choices: Mapping[str, Value], tokens: int, position: int) -> None:
        self.facts, self.choices, self.tokens, self.position = facts, choices, tokens, position
        self.nodes: list[Node] = []
        self.edges: list[tuple[int, int]] = []
        self.form = str(choices.get("weight_format", "f32"))
        head = str(choices.get("head_format", SAME))
        self.head_form = self.form if head == SAME else head

    def whole(self) -> tuple[list[Node], list[tuple[int, int]]]:
        """Return nodes and edges."""
        d, layers = self.facts.decoder, self.facts.layers
        x = self._add("look", 1, [], weight=self.tokens * d.hidden * self._bytes(self.head_form), columns=d.hidden)
        n = self._plain("norm", layers, [x], d.hidden)
        q, k, v = (self._product(layers, [n], w, d.hidden) for w in (d.attended, d.cached, d.cached))
        if d.head_norms:
            q, k = (self._plain("norm", layers, [i], w) for i, w in ((q, d.attended), (k, d.cached)))
        q, k = (self._plain("rope", layers, [i], w) for i, w in ((q, d.attended), (k, d.cached)))
        o = self._product(layers, [self._attention([q, k, v])], d.hidden, d.attended)
        x = self._plain("add", layers, [x, o], d.hidden)
        n = self._plain("norm", layers, [x], d.hidden)
        gate, up = (self._product(layers, [n], d.inner, d.hidden) for _ in range(2))
        down = self._product(layers, [self._plain("activation", layers, [gate, up], d.inner)], d.hidden, d.inner)
        x = self._plain("add", layers, [x, down], d.hidden)
        n = self._plain("norm", 1, [x], d.hidden)
        self._add(
            "head",
            1,
            [n],
            weight=d.vocabulary * d.hidden * self._bytes(self.head_form),
            other=4 * (d.vocabulary + d.hidden),
            flops=2 * d.vocabulary * d.hidden,
            columns=d.vocabulary,
            depth=d.hidden,
            rows=1,
        )
        return self.nodes, self.edges

    def _bytes(self, form: str) -> float:
        return bits(form, in_panels(self.choices)) / 8

    def _product(self, count: int, inputs: Sequence[int], columns: int, depth: int) -> int:
        if self.choices.get("kernel") == "own" and self.form in INTEGERS:
            inputs = [self._plain("quantize", count, inputs, depth)]
        t = self.tokens
        return self._add(
            "product",
            count,
            inputs,
            weight=columns * depth * self._bytes(self.form),
            other=4 * t * (columns + depth),
            flops=2 * t * columns * depth,
            columns=columns,
            depth=depth,
        )

    def _plain(self, kind: str, count: int, inputs: Sequence[int], width: int) -> int:
        size = self.tokens * width
        return self._add(kind, count, inputs, other=4 * size * (1 + len(inputs)), flops=4 * size, columns=width)

    def _attention(self, inputs: Sequence[int]) -> int:
        d, t = self.facts.decoder, self.tokens
        cache = {"f32": 4.0, "f16": 2.0, "int8": 1.0}.get(str(self.choices.get("kv_dtype", "f32")), 4.0)
        other = 2 * self.position * d.cached * cache + 8 * t * d.attended
        flops = 4 * t * self.position * d.attended
        return self._add(
            "attention", self.facts.layers, inputs, other=other, flops=flops, columns=d.attended, depth=self.position
        )

    def _add(
        self,
        kind: str,
        count: int,
        inputs: Sequence[int],
        *,
        weight: float = 0.0,
        other: float = 0.0,
        flops: float = 0.0,
        columns: int = 1,
        depth: int = 1,
        rows: int = 0,
    ) -> int:
        self.nodes.append(Node(kind, count, weight, other, flops, rows or self.tokens, columns, depth))
        self.edges += [(i, len(self.nodes) - 1) for i in inputs]
        return len(self.nodes) - 1


def bytes_of(graph: Graph) -> float:
    """Return the bytes that a drawn graph's step reads and writes."""
    sizes = np.expm1(graph.features[:, len(KINDS) : len(KINDS) + 2])
    return float((sizes.sum(1) * graph.counts).sum())
