"""The linear relaxation of a program, its bound, and the exact program where it is small; both by HiGHS.

Replicas are eliminated from the relaxation: at its optimum each is as large as the requests on it. What is left has a
row for each class of requests and one for each class of nodes, so that a thousand nodes are as quick as ten. highspy
is HiGHS alone, 3 MB; scipy brings the same solver with 35 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmbuild.errors import LlmbuildError
from llmbuild.fleet.plan.program import Program

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Relaxed:
    """The optimum of the relaxation: replicas as fractions, what finds no place, and the cost, a lower bound."""

    replicas: tuple[float, ...]
    """By option."""
    missing: tuple[tuple[float, ...], ...]
    """Requests a second by service and class."""
    bound: float
    shortage: float
    """Of all requests that find no place, by priority: no plan has less."""


@dataclass(frozen=True)
class Exact:
    """What the exact program found within its branches: replicas by option, and the bound it proved."""

    replicas: tuple[int, ...]
    bound: float
    proven: bool


class _Model:
    """Columns and rows for HiGHS, gathered one after another."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.upper: list[float] = []
        self.whole: list[bool] = []
        self.starts, self.index, self.value = [0], list[int](), list[float]()
        self.low: list[float] = []
        self.high: list[float] = []

    def column(self, cost: float, upper: float, whole: bool = False) -> int:
        """Add a column from 0 to `upper`, and return its index."""
        self.cost.append(cost)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.cost) - 1

    def row(self, parts: list[tuple[int, float]], low: float, high: float) -> None:
        """Add a row."""
        self.index += [i for i, _ in parts]
        self.value += [v for _, v in parts]
        self.starts.append(len(self.index))
        self.low.append(low)
        self.high.append(high)

    def solve(self, branches: int | None = None) -> tuple[Any, float, float, bool]:
        """Return the columns' values, the objective, its bound, and whether it is optimal.

        Raises:
            LlmbuildError: HiGHS found no solution.
        """
        import highspy

        solver = _silent()
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("random_seed", 0)
        if branches is not None:
            solver.setOptionValue("mip_max_nodes", branches)  # a time would end equal programs in different places
            solver.setOptionValue("mip_rel_gap", 1e-6)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.cost), len(self.low)
        lp.col_cost_, lp.col_lower_ = np.array(self.cost), np.zeros(len(self.cost))
        lp.col_upper_ = np.array(self.upper)
        lp.row_lower_, lp.row_upper_ = np.array(self.low), np.array(self.high)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.array(self.starts, dtype=np.int32)
        lp.a_matrix_.index_ = np.array(self.index, dtype=np.int32)
        lp.a_matrix_.value_ = np.array(self.value)
        if any(self.whole):
            kinds = (highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous)
            lp.integrality_ = [kinds[0] if whole else kinds[1] for whole in self.whole]
        solver.passModel(lp)
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        optimal = status == highspy.HighsModelStatus.kOptimal
        if not optimal and info.primal_solution_status != 2:
            raise LlmbuildError(f"HiGHS found no plan: {solver.modelStatusToString(status)}")
        values = np.array(solver.getSolution().col_value)
        bound = info.mip_dual_bound if any(self.whole) else info.objective_function_value
        return values, info.objective_function_value, bound, optimal


def _silent() -> Any:
    """Return a solver that prints nothing: `Highs` prints its name when its callbacks are set up, which we need not."""
    import highspy

    class Silent(highspy.Highs):
        def __init__(self) -> None:
            super(highspy.Highs, self).__init__()
            self.setOptionValue("output_flag", False)

    return Silent()


def relaxed(program: Program) -> Relaxed:
    """Return the optimum of the relaxation: first the least shortage by priority, then the least cost."""
    shortage, missing = _least_shortage(program)
    model, flows, lacks = _flows(program, cost=True)
    if shortage > _TOLERANCE:
        weights = _weights(program)
        model.row([(column, weights[s]) for (s, _), column in lacks.items()], 0.0, shortage * (1 + _TOLERANCE))
    else:
        for column in lacks.values():
            model.upper[column] = 0.0
    values, objective, _, _ = model.solve()
    replicas = np.zeros(len(program.options))
    for column, (option, c) in enumerate(flows):
        replicas[option] += values[column] / program.options[option].takes[c].rate
    if shortage > _TOLERANCE:
        missing = _missing(program, values, lacks)
    return Relaxed(
        tuple(float(x) for x in replicas), missing, float(objective), shortage if shortage > _TOLERANCE else 0.0
    )


def _weights(program: Program) -> tuple[float, ...]:
    return tuple(service.priority for service in program.fleet.services)


def _least_shortage(program: Program) -> tuple[float, tuple[tuple[float, ...], ...]]:
    model, _, lacks = _flows(program, cost=False)
    for (s, _), column in lacks.items():
        model.cost[column] = program.fleet.services[s].priority
    values, objective, _, _ = model.solve()
    return float(objective), _missing(program, values, lacks)


def _missing(program: Program, values: Any, lacks: dict[tuple[int, int], int]) -> tuple[tuple[float, ...], ...]:
    found = [[0.0] * len(rates) for rates in program.demands]
    for (s, c), column in lacks.items():
        value = float(values[column])
        found[s][c] = value if value > _TOLERANCE * max(1.0, program.demands[s][c]) else 0.0
    return tuple(map(tuple, found))


def _flows(program: Program, cost: bool) -> tuple[_Model, list[tuple[int, int]], dict[tuple[int, int], int]]:
    """Return the relaxation, its columns as (option, class), and the columns of what finds no place."""
    model, flows = _Model(), list[tuple[int, int]]()
    by_class: dict[tuple[int, int], list[tuple[int, float]]] = {}
    by_place: list[list[tuple[int, float]]] = [[] for _ in program.places]
    for o, option in enumerate(program.options):
        node = program.fleet.nodes[option.node]
        alone = 0.0 if node.partitions else program.node_cost[option.node] / node.slots
        replica = option.hold + alone  # nodes with layouts have columns of their own
        for c, take in enumerate(option.takes):
            if take.rate <= 0:
                continue
            column = model.column(replica / take.rate + option.costs[c] if cost else 0.0, np.inf)
            flows.append((o, c))
            by_class.setdefault((option.service, c), []).append((column, 1.0))
            by_place[option.place].append((column, 1 / take.rate))
    lacks = {}
    for s, rates in enumerate(program.demands):
        for c, rate in enumerate(rates):
            lacks[s, c] = model.column(0.0, np.inf)
            model.row([*by_class.get((s, c), []), (lacks[s, c], 1.0)], rate, rate)
    nodes = [part for k in range(len(program.columns)) for part in _nodes(model, program, k, by_place, cost)]
    if program.max_nodes is not None:
        model.row(nodes, 0.0, float(program.max_nodes))
    return model, flows, lacks


def _nodes(
    model: _Model, program: Program, k: int, by_place: list[list[tuple[int, float]]], cost: bool
) -> list[tuple[int, float]]:
    """Bound what a class of nodes holds by its nodes, and return how many nodes it takes, by column.

    Without partitions the nodes are eliminated as replicas are: a share of a node for each slot.
    """
    node, of = program.fleet.nodes[k], program.columns[k]
    here = [parts for place, parts in zip(program.places, by_place, strict=True) if place.node == k]
    if node.partitions is None:
        if here[0]:
            model.row(here[0], 0.0, float(node.count * node.slots))
        return [(column, share / node.slots) for column, share in here[0]]
    layouts = [model.column(program.node_cost[k] if cost else 0.0, np.inf) for _ in of.layouts]
    for part, parts in enumerate(here):
        have = [(column, -float(counts[part])) for column, counts in zip(layouts, of.counts, strict=True)]
        model.row([*parts, *((column, share) for column, share in have if share)], -np.inf, 0.0)
    if layouts:
        model.row([(column, 1.0) for column in layouts], 0.0, float(node.count))
    return [(column, 1.0) for column in layouts]


def exact(program: Program, missing: tuple[tuple[float, ...], ...], branches: int) -> Exact | None:
    """Return the integer program's solution with at most this shortage; None where so many branches found none."""
    model = _Model()
    nodes = [
        [model.column(cost, node.count, True) for _ in of.layouts]
        for node, cost, of in zip(program.fleet.nodes, program.node_cost, program.columns, strict=True)
    ]
    slots = program.slots
    found = [model.column(o.hold, float(slots[o.place]), True) for o in program.options]
    by_class: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for o, option in enumerate(program.options):
        parts = [(found[o], -1.0)]
        for c, take in enumerate(option.takes):
            if take.rate > 0:
                column = model.column(option.costs[c], np.inf)
                parts.append((column, 1 / take.rate))
                by_class.setdefault((option.service, c), []).append((column, 1.0))
        model.row(parts, -np.inf, 0.0)
    for s, rates in enumerate(program.demands):
        for c, rate in enumerate(rates):
            served = rate - missing[s][c]
            if served > 0:
                model.row(by_class.get((s, c), []), served * (1 - 1e-9), np.inf)
    for at, place in enumerate(program.places):
        parts = [(found[o], 1.0) for o, option in enumerate(program.options) if option.place == at]
        counts = program.columns[place.node].counts
        have = [(column, -float(each[place.part])) for column, each in zip(nodes[place.node], counts, strict=True)]
        model.row([*parts, *((column, share) for column, share in have if share)], -np.inf, 0.0)
    for node, layouts in zip(program.fleet.nodes, nodes, strict=True):
        if len(layouts) > 1:
            model.row([(column, 1.0) for column in layouts], 0.0, float(node.count))
    if program.max_nodes is not None:
        model.row([(column, 1.0) for layouts in nodes for column in layouts], 0.0, float(program.max_nodes))
    try:
        values, _, bound, optimal = model.solve(branches)
    except LlmbuildError:
        return None
    return Exact(tuple(round(values[column]) for column in found), float(bound), optimal)
