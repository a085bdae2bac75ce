"""Where the operators of a cell stand: layers by device for what reads weights, shares of rows for attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from llmbuild.fleet.operators.profile import DENSE, LAYER, Kind, Shape

Level = Literal["replica", "tensor", "pipeline", "operators"]
"""A whole model on one device; each matrix over several; whole layers over several; or operators apart."""


@dataclass(frozen=True)
class Placement:
    """A cell's devices and what each holds.

    Devices time-share: one runs the calls of all that it holds, one after the other. Keys and values lie where
    attention runs.
    """

    level: Level
    name: str
    devices: int
    """Devices with work of their own; those of a `tensor` cell work as one."""
    owners: tuple[tuple[Kind, tuple[int, ...]], ...]
    """The device of each layer, for `qkv`, `out` and `mlp`."""
    rows: tuple[float, ...] = ()
    """Share of the rows whose attention each device computes, for all layers. Empty: it runs where its `qkv` does."""

    @property
    def head(self) -> int:
        """Return the device of the head and the embedding: that of the last layer's `out`."""
        return self.owner("out")[-1]

    def owner(self, kind: Kind) -> tuple[int, ...]:
        """Return the device of each layer of a kind that reads weights."""
        return next(owners for name, owners in self.owners if name == kind)

    @cached_property
    def visits(self) -> tuple[dict[Kind, int], ...]:
        """Return the calls of each kind on each device in one step of one batch."""
        found: list[dict[Kind, int]] = [{} for _ in range(self.devices)]
        for kind in ("qkv", "out", "mlp"):
            for device in self.owner(kind):
                found[device][kind] = found[device].get(kind, 0) + 1
        found[self.head]["head"] = 1
        layers = len(self.owner("qkv"))
        for device in range(self.devices):
            calls = self.owner("qkv").count(device) if not self.rows else layers * (self.rows[device] > 0)
            if calls:
                found[device]["attention"] = calls
        return tuple(found)

    @cached_property
    def alike(self) -> tuple[tuple[int, int], ...]:
        """Return one device of each kind of load, and how many devices have the same."""
        found: dict[tuple[object, float], list[int]] = {}
        for device, calls in enumerate(self.visits):
            found.setdefault((tuple(calls.items()), self.share(device)), []).append(device)
        return tuple((devices[0], len(devices)) for devices in found.values())

    def share(self, device: int) -> float:
        """Return the share of the keys and values that a device holds."""
        if self.rows:
            return self.rows[device]
        return self.visits[device].get("attention", 0) / len(self.owner("qkv"))

    def weights(self, of: Shape, device: int) -> float:
        """Return the bytes of weights on a device."""
        calls = self.visits[device]
        return sum(of.weights(k) * calls.get(k, 0) / (1 if k == "head" else of.layers) for k in DENSE)

    def kv_tokens(self, of: Shape, room_bytes: float) -> float:
        """Return the positions that a cell holds, where each device has so much room for weights and cache."""
        found = []
        for device in range(self.devices):
            left = room_bytes - self.weights(of, device)
            if left < 0:
                return 0.0
            if self.share(device):
                found.append(left / (of.kv_bytes * self.share(device)))
        return min(found)

    def sent(self, of: Shape) -> tuple[int, float]:
        """Return how often a batch crosses a link in one step, and the bytes that each of its rows sends."""
        hops, total = 0, 0.0
        for part, to in self.moves(of):
            if part > 0:
                hops += 1
                total += part * of.passed(to)
        return hops, total

    def moves(self, of: Shape) -> list[tuple[float, Kind]]:
        """Return the share of rows that changes the device at each boundary of a step, and the operator behind it."""
        found: list[tuple[float, Kind]] = []
        before = self.head
        for layer in range(of.layers):
            qkv, out, mlp = (self.owner(kind)[layer] for kind in LAYER if kind != "attention")
            found.append((float(before != qkv), "qkv"))
            found.append((1 - self.rows[qkv] if self.rows else 0.0, "attention"))
            found.append((1 - self.rows[out] if self.rows else float(qkv != out), "out"))
            found.append((float(out != mlp), "mlp"))
            before = mlp
        return [*found, (float(before != self.head), "head")]


def whole(of: Shape) -> Placement:
    """Return a whole model on one device, or on `of.devices` that work as one."""
    level: Level = "replica" if of.devices == 1 else "tensor"
    name = level if of.devices == 1 else f"tensor x{of.devices}"
    return Placement(level, name, 1, _everything((0,) * of.layers))


def placements(of: Shape, devices: int) -> list[Placement]:
    """Return the ways to place operators on several devices that are looked at, pipelines among them."""
    by = f" by {of.devices}" if of.devices > 1 else ""
    found = [
        Placement("pipeline", f"pipeline x{devices}{by}", devices, _everything(_spread(range(devices), of.layers)))
    ]
    for dense in range(1, devices + 1):
        for share in SHARES if dense < devices else (1.0,):
            rows = _rows(devices, dense, share if dense == devices else share * dense / devices)
            name = f"dense x{dense}, attention x{sum(each > 0 for each in rows)}{by}{_told(share, dense < devices)}"
            owners = _everything(_spread(range(dense), of.layers))
            found.append(Placement("operators", name, devices, owners, rows))
    for mlp in range(1, devices):
        for share in SHARES[::2]:
            rows = _rows(devices, mlp, share * mlp / devices)
            others = _spread(range(mlp, devices), of.layers)
            owners = (("qkv", others), ("out", others), ("mlp", _spread(range(mlp), of.layers)))
            name = f"mlp x{mlp}, products x{devices - mlp}, attention x{sum(each > 0 for each in rows)}"
            found.append(Placement("operators", name + by + _told(share, True), devices, owners, rows))
    return found


SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)
"""Shares of an even part of the rows that devices with weights take beside them."""


def _told(share: float, apart: bool) -> str:
    return f" ({share:.0%} beside weights)" if apart and share else ""


def _everything(owners: tuple[int, ...]) -> tuple[tuple[Kind, tuple[int, ...]], ...]:
    return (("qkv", owners), ("out", owners), ("mlp", owners))


def _spread(devices: Sequence[int], layers: int) -> tuple[int, ...]:
    """Return the device of each layer: layers that follow each other on one, as even as whole layers allow."""
    return tuple(devices[layer * len(devices) // layers] for layer in range(layers))


def _rows(devices: int, first: int, share: float) -> tuple[float, ...]:
    """Return shares of rows: `share` over the first devices, what is left over the others."""
    rest = devices - first
    return tuple(share / first if device < first else (1 - share) / rest for device in range(devices))
