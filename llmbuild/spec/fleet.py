"""A fleet: classes of nodes, services with their requests and SLOs, and profiles of what runs where, as data."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from llmbuild.spec.cluster import Cluster, Pods
from llmbuild.spec.figures import Architecture, Machine
from llmbuild.spec.load_curve import Fit, OwnTime
from llmbuild.spec.partitions import Layout, Partitions
from llmbuild.spec.slo import Bound
from llmbuild.spec.tariff import Tariff

Basis = Literal["measured", "published", "estimated"]
BASES: tuple[Basis, ...] = ("measured", "published", "estimated")
"""Where a number comes from, the strongest first: read here, read by a named source, or computed from other numbers."""

FleetObjective = Literal["energy", "cost", "nodes"]

Guarded = Literal["set_clock", "set_power", "set_partition"]
GUARDED: tuple[Guarded, ...] = ("set_clock", "set_power", "set_partition")
"""Actions that change a device for everybody who uses it: done only where the fleet file allows them by name."""

HOST = "host"
"""In place of a machine's digits: the machine that reads the file."""


def weakest(bases: Iterable[Basis]) -> Basis:
    """Return the weakest basis: what is made of several numbers is as good as the worst of them."""
    return max(bases, key=BASES.index)


@dataclass(frozen=True)
class Line:
    """Values at increasing places, with straight lines between them; beyond the ends the nearest line goes on."""

    at: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, x: float) -> float:
        """Return the value at x."""
        if len(self.at) == 1:
            return self.values[0]
        i = min(max(bisect_right(self.at, x), 1), len(self.at) - 1)
        low, high = self.at[i - 1], self.at[i]
        return self.values[i - 1] + (self.values[i] - self.values[i - 1]) * (x - low) / (high - low)

    def times(self, factor: float) -> Line:
        """Return the line with its values scaled."""
        return Line(self.at, tuple(value * factor for value in self.values))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the engine: of its decoding rows, of what these see, and of the prompt tokens in it."""

    rows_s: Line
    """By decoding rows, at no context; at 0 rows what a step of prompts alone costs besides its tokens."""
    context_s: float
    """For each position that each decoding row sees."""
    prompt_s: float
    """For each token of a prompt."""
    request_s: float = 0.0
    """For each request, besides its tokens."""
    fit: Fit | None = None
    """What the device takes for steps of any work, prompts beside decoding rows too; None: known by the rest alone."""
    own: OwnTime | None = None
    """With `fit`: what the server takes besides."""

    def seconds(self, rows: float, context: float, prompt_tokens: float) -> float:
        """Return the seconds of a step; `context` is the sum of positions that its decoding rows see."""
        return max(self.rows_s(rows), 0.0) + self.context_s * context + self.prompt_s * prompt_tokens

    def at_clock(self, clock: Clock) -> StepTime:
        """Return the seconds at another clock, at which no fit is known."""
        decode, prompt_s = clock.decode_time, self.prompt_s * clock.prompt_time
        return StepTime(self.rows_s.times(decode), self.context_s * decode, prompt_s, self.request_s)

    def times(self, factor: float) -> StepTime:
        """Return the seconds of a device that is slower by a factor; a server takes as long as before."""
        fit = self.fit and self.fit.times(factor)
        scaled = self.rows_s.times(factor), self.context_s * factor, self.prompt_s * factor
        return StepTime(*scaled, self.request_s, fit, self.own)


@dataclass(frozen=True)
class StepPower:
    """Watts of a slot while a step runs: by its decoding rows, and while prompts are computed."""

    rows_w: Line
    prompt_w: float

    def at_clock(self, clock: Clock) -> StepPower:
        """Return the watts at another clock."""
        return StepPower(self.rows_w.times(clock.power), self.prompt_w * clock.power)


@dataclass(frozen=True)
class Clock:
    """A clock that a class of nodes may be set to: seconds and watts as ratios to those of the profile."""

    mhz: int
    decode_time: float
    prompt_time: float
    power: float
    basis: Basis = "estimated"
    source: str = ""


UNSET = Clock(0, 1.0, 1.0, 1.0, "measured")
"""The clock at which a profile was taken: nothing is set."""


@dataclass(frozen=True)
class Profile:
    """What a variant does on one slot of a device, and where each number comes from."""

    device: str
    model: str
    variant: str
    step: StepTime
    power: StepPower | None
    max_rows: int
    """Rows up to which the figures are known: a batch limit never exceeds it."""
    weights_bytes: float
    kv_bytes_per_token: float
    load_s: float
    decode_basis: Basis
    prompt_basis: Basis
    power_basis: Basis
    source: str
    quality_kl: float | None = None
    error: float = 0.0
    """Largest relative error of the fit on its own rows; of an estimate, what nine of ten stay below."""
    estimate: bool = False
    """Whether all of it is an estimate, which rows of other devices and models led to as well."""

    @property
    def basis(self) -> Basis:
        """Return the weakest basis of its numbers."""
        return weakest((self.decode_basis, self.prompt_basis, self.power_basis))

    @property
    def told(self) -> str:
        """Return the basis in words: one, or one for each part."""
        parts = {"decode": self.decode_basis, "prompt": self.prompt_basis, "power": self.power_basis}
        if len(set(parts.values())) == 1:
            return self.basis
        return ", ".join(f"{name} {basis}" for name, basis in parts.items())


@dataclass(frozen=True)
class NodeClass:
    """Nodes of one kind. A node has `slots` equal devices, or partitions of one, and each holds one replica."""

    name: str
    count: int
    device: str
    """What profiles name: a published device, or the first digits of a catalog's machine."""
    machine: bool
    """Whether `device` is a machine of a catalog."""
    slots: int
    memory_bytes: float
    """Of each slot."""
    host_w: float
    """Of a node that is on, besides its slots."""
    bare_w: float
    """Of a slot that holds nothing."""
    parked_w: float
    """Of a slot that holds a loaded replica without requests."""
    active_w: float
    """Of a slot that runs a step, for profiles without watts; 0: not known."""
    boot_s: float
    """From off to taking replicas."""
    watts_basis: Basis
    source: str = ""
    price_per_h: float = 0.0
    """Of a node that is on."""
    clocks: tuple[Clock, ...] = ()
    cores: tuple[tuple[int, ...], ...] = ()
    """CPUs of each slot, node by node, where the nodes are parts of the machine that runs them."""
    variants: tuple[str, ...] = ()
    """First digits of the variants that may run on it; empty: all."""
    pods: Pods | None = None
    """How its slots are asked for on Kubernetes."""
    partitions: Partitions | None = field(default=None, hash=False)
    """How its devices are divided, where they are in MIG mode; `slots` counts devices then, not slices."""

    @property
    def idle_w(self) -> float:
        """Return the watts of a node that is on and holds nothing; slices do not lower them."""
        return self.host_w + self.slots * self.bare_w

    @property
    def nodes(self) -> tuple[str, ...]:
        """Return the names of its nodes."""
        return tuple(f"{self.name}-{i}" for i in range(self.count))

    @property
    def slot_cores(self) -> int:
        """Return the CPUs that a slot computes on; 0 where it computes on a device, or the file does not say."""
        if self.cores:
            return len(self.cores[0])
        return self.pods.cpus if self.pods and not self.pods.resources else 0


@dataclass(frozen=True)
class RequestClass:
    """Requests of one kind: their share of a service, their mean lengths, and what each of them must meet."""

    name: str
    share: float
    prompt: float
    output: float
    spread: float
    """Coefficient of variation of both lengths, which are taken as log-normal."""
    ttft_s: float = math.inf
    tpot_s: float = math.inf


@dataclass(frozen=True)
class Service:
    """A model that is asked for at a rate, and the share of all its requests that must meet their class's SLO."""

    name: str
    model: str
    rate: float
    """Requests a second."""
    classes: tuple[RequestClass, ...]
    attainment: float = 0.99
    priority: float = 1.0
    """Weight of requests that find no place."""
    quality: tuple[Bound, ...] = ()


@dataclass(frozen=True)
class Fleet:
    """All of it, as one file says it."""

    name: str
    nodes: tuple[NodeClass, ...]
    services: tuple[Service, ...]
    profiles: tuple[Profile, ...] = ()
    """Those that the file gives; others come from published rows and from a catalog."""
    objective: FleetObjective = "energy"
    policy: str = "adaptive"
    period_s: float = 10.0
    """Between two decisions of a policy."""
    actuators: tuple[Guarded, ...] = ()
    """Guarded actions that are allowed."""
    cluster: Cluster | None = None
    """Where it runs on Kubernetes."""
    tariff: Tariff | None = None
    """What electricity costs and emits."""
    estimates: bool = False
    """Whether a model gets estimated profiles on devices that have none of it."""
    machines: tuple[Machine, ...] = ()
    """Figures of devices that estimates do not know, or that stand for those that they do."""
    architectures: tuple[Architecture, ...] = ()
    """The same of models."""

    def node_class(self, name: str) -> NodeClass:
        """Return the class of that name."""
        return next(each for each in self.nodes if each.name == name)

    def service(self, name: str) -> Service:
        """Return the service of that name."""
        return next(each for each in self.services if each.name == name)

    def layouts(self, node: NodeClass) -> tuple[Layout, ...]:
        """Return the layouts that a node may take: what it has, where the file does not allow to change it."""
        if node.partitions is None:
            return ()
        return node.partitions.layouts if "set_partition" in self.actuators else (node.partitions.now,)

    def undivided(self) -> Fleet:
        """Return the fleet without partitions: each device is one slot."""
        return replace(self, nodes=tuple(replace(n, partitions=None) for n in self.nodes))

    def without_clocks(self) -> Fleet:
        """Return the fleet whose nodes run at the clock that they have."""
        return replace(self, nodes=tuple(replace(n, clocks=()) for n in self.nodes))

    def at_rate(self, factor: float) -> Fleet:
        """Return the fleet with every rate scaled."""
        return replace(self, services=tuple(replace(s, rate=s.rate * factor) for s in self.services))

    def with_counts(self, counts: dict[str, int]) -> Fleet:
        """Return the fleet with other counts of nodes."""
        return replace(self, nodes=tuple(replace(n, count=counts.get(n.name, n.count)) for n in self.nodes))
