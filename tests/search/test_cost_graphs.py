"""The graph form of scripts/bench/costmodel.py: what is drawn of a model, and what its network makes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from llmbuild.build.price import weights
from llmbuild.spec.model import facts_of

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import costmodel
import program_graph
from costmodel import Fold, compared
from program_graph import KINDS, of_operators

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}


def test_products_of_a_drawn_graph_read_every_weight_once() -> None:
    facts = facts_of(SMALL)
    graph = of_operators(facts, {"weight_format": "f16"}, tokens=1, position=8)
    products = graph.features[:, [KINDS.index("product"), KINDS.index("head")]].any(1)
    read = (np.expm1(graph.features[:, len(KINDS)]) * graph.counts)[products].sum()
    assert round(read) == 2 * weights(facts)


def test_edges_lead_from_earlier_operators_to_later_ones() -> None:
    graph = of_operators(facts_of(SMALL), {"weight_format": "int8", "kernel": "own", "layout": "packed"}, 8, 8)
    assert all(source < target < len(graph.counts) for source, target in graph.edges)
    assert {target for _, target in graph.edges} == set(range(1, len(graph.counts)))


def test_fewer_bits_move_fewer_bytes() -> None:
    facts = facts_of(SMALL)
    moved = [
        program_graph.bytes_of(of_operators(facts, {"weight_format": form}, 1, 8)) for form in ("f32", "f16", "int8")
    ]
    assert moved == sorted(moved, reverse=True)


def test_the_network_ranks_a_model_that_it_has_not_seen() -> None:
    from graph_model import Lessons, batched, scores

    def graphs(layers: int) -> list[program_graph.Graph]:
        facts = facts_of({**SMALL, "num_hidden_layers": layers})
        return [of_operators(facts, {"weight_format": form}, 1, 8) for form in ("f32", "f16", "int8")]

    nothing = np.zeros((3, 1))
    lesson = Lessons.of(batched(graphs(3), nothing), np.log([1.0, 0.5, 0.25]))
    assert np.argsort(scores([lesson], batched(graphs(5), nothing))).tolist() == [2, 1, 0]


def test_a_model_that_ranks_as_the_search_does_has_no_more() -> None:
    actual = np.arange(12.0)
    fold = Fold(
        "held",
        "tpot_s",
        actual,
        {costmodel.TODAY: actual, "graph": actual + 1.0, "nearest": -actual},
        tuple(map(str, actual)),
    )
    more = {row["model"]: row["more"] for row in compared([fold])}
    assert more == {costmodel.TODAY: [0.0, 0.0, 0.0], "graph": [0.0, 0.0, 0.0], "nearest": [-2.0, -2.0, -2.0]}
