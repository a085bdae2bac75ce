"""A small message-passing network over graphs of programs, trained to rank the points of a study.

As in TpuGraphs and TGraph, the configuration is part of the features of every node, and the loss is a pairwise hinge
within a study. Here a squared error on losses relative to point 0 is added: studies of different machines and sizes
share that scale. A program's score is the logarithm of the sum of what its nodes are thought to cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from program_graph import Graph
from torch import nn

Array = NDArray[np.float64]

WIDTH, ROUNDS = 32, 2
"""Width of a node's state, and how often neighbours tell each other theirs."""
STEPS, RATE, DECAY = 200, 5e-3, 1e-2
MARGIN = 0.1
"""How far apart the scores of two points are wanted, on a logarithmic scale."""
SEEDS = 2
"""Networks whose scores are averaged."""


@dataclass(frozen=True)
class Batch:
    """The graphs of a study's points, padded: node features f32[B,N,F], counts f32[B,N] (0: padding), what flows in
    from producers f32[B,N,N] (rows sum to 1, or 0 without any), and choices f32[B,C].
    """

    nodes: torch.Tensor
    counts: torch.Tensor
    inflow: torch.Tensor
    outflow: torch.Tensor
    choices: torch.Tensor


def batched(graphs: Sequence[Graph], choices: Array) -> Batch:
    """Return graphs with their points' choices f64[B,C] as one batch."""
    most, width = max(len(g.counts) for g in graphs), graphs[0].features.shape[1]
    nodes = np.zeros((len(graphs), most, width), np.float32)
    counts = np.zeros((len(graphs), most), np.float32)
    edges = np.zeros((len(graphs), most, most), np.float32)
    for b, graph in enumerate(graphs):
        nodes[b, : len(graph.counts)], counts[b, : len(graph.counts)] = graph.features, graph.counts
        for source, target in graph.edges:
            edges[b, target, source] = 1.0
    inflow = edges / np.maximum(edges.sum(2, keepdims=True), 1.0)
    back = edges.transpose(0, 2, 1)
    outflow = back / np.maximum(back.sum(2, keepdims=True), 1.0)
    return Batch(*map(torch.from_numpy, (nodes, counts, inflow, outflow, choices.astype(np.float32))))


class Network(nn.Module):
    """Scores f32[B] of a batch: logarithms of time, up to a constant."""

    def __init__(self, width: int, choices: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(width + choices, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.told = nn.ModuleList(nn.Linear(3 * WIDTH, WIDTH) for _ in range(ROUNDS))
        self.cost = nn.Linear(WIDTH, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the scores."""
        wide = batch.choices[:, None, :].expand(-1, batch.nodes.shape[1], -1)
        state = self.enter(torch.cat([batch.nodes, wide], -1))
        for told in self.told:
            around = torch.cat([state, batch.inflow @ state, batch.outflow @ state], -1)
            state = state + torch.relu(told(around))
        cost = self.cost(torch.relu(state))[..., 0] + torch.log(batch.counts.clamp(min=1e-30))
        return torch.logsumexp(cost, 1)


@dataclass(frozen=True)
class Lessons:
    """A study to learn from: its points' batch, with point 0 first, and their losses f32[B] relative to point 0."""

    batch: Batch
    losses: torch.Tensor

    @staticmethod
    def of(batch: Batch, losses: Array) -> Lessons:
        """Return the lessons of a batch with losses f64[B]."""
        return Lessons(batch, torch.from_numpy(losses.astype(np.float32)))


def scores(learned: Sequence[Lessons], asked: Batch) -> Array:
    """Return the scores f64[B] of a batch after training on studies, a mean over `SEEDS` networks."""
    told = [_trained(learned, seed) for seed in range(SEEDS)]
    with torch.no_grad():
        return np.mean([net(_scaled(asked, *scale)).double().numpy() for net, scale in told], 0)


def _trained(learned: Sequence[Lessons], seed: int) -> tuple[Network, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(seed)
    real = torch.cat([one.batch.nodes[one.batch.counts > 0] for one in learned])
    scale = (real.mean(0), real.std(0).clamp(min=1e-3))
    batches = [_scaled(one.batch, *scale) for one in learned]
    net = Network(real.shape[1], learned[0].batch.choices.shape[1])
    steps = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(steps, STEPS)
    for _ in range(STEPS):
        steps.zero_grad()
        loss = torch.stack([_loss(net(b), one.losses) for b, one in zip(batches, learned, strict=True)]).mean()
        loss.backward()
        steps.step()
        plan.step()
    return net, scale


def _scaled(batch: Batch, centre: torch.Tensor, spread: torch.Tensor) -> Batch:
    return Batch((batch.nodes - centre) / spread, batch.counts, batch.inflow, batch.outflow, batch.choices)


def _loss(found: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Return the hinge over all pairs of a study's points, and the squared error relative to point 0."""
    apart, wanted = found[:, None] - found[None, :], losses[:, None] - losses[None, :]
    reach = torch.minimum(wanted.abs(), torch.tensor(MARGIN))
    hinge = torch.relu(reach - torch.sign(wanted) * apart).mean()
    return hinge + ((found - found[0]) - losses).square().mean()
