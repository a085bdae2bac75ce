"""Small fleets for tests: profiles whose numbers are easy to follow, and requests drawn by a seed."""

from __future__ import annotations

from dataclasses import replace

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.policy import Given, Observation, Target
from llmbuild.spec.fleet import Clock, Fleet, Line, NodeClass, Profile, RequestClass, Service, StepPower, StepTime
from llmbuild.spec.partitions import CHANGES, GPUS, ChangeBy, Partitions, fullest, layout_of

GB = 1e9


def profile(device: str = "fast", model: str = "m", speed: float = 1.0, rows: int = 16, load_s: float = 5.0) -> Profile:
    """Return a profile that decodes a row in 10 ms, and 16 in 25 ms, at speed 1."""
    step = StepTime(Line((1.0, 16.0), (0.010 / speed, 0.025 / speed)), 1e-7 / speed, 1e-4 / speed)
    power = StepPower(Line((1.0, 16.0), (200.0, 300.0)), 350.0)
    return Profile(
        device, model, "v", step, power, rows, 1 * GB, 1e4, load_s, "measured", "measured", "measured", "made up"
    )


def node(name: str = "fast", count: int = 4, slots: int = 1, clocks: tuple[Clock, ...] = ()) -> NodeClass:
    """Return a class of nodes that boots in 20 s and draws 50 W beside its slots."""
    return NodeClass(
        name=name,
        count=count,
        device=name,
        machine=False,
        slots=slots,
        memory_bytes=16 * GB,
        host_w=50.0,
        bare_w=20.0,
        parked_w=60.0,
        active_w=0.0,
        boot_s=20.0,
        watts_basis="measured",
        price_per_h=1.0,
        clocks=clocks,
    )


def divided_node(
    name: str = "gpu",
    count: int = 2,
    layouts: tuple[str, ...] = (),
    now: tuple[str, ...] = ("7g.80gb",),
    change: ChangeBy = "direct",
) -> NodeClass:
    """Return a class of nodes with an H100 each that may take all layouts, or one besides what it has."""
    gpu = GPUS["H100-80GB"]
    by_name = {each.name: each for each in gpu.slices}
    have = layout_of(by_name[each] for each in now)
    some = (layout_of(by_name[each] for each in layouts), have) if layouts else fullest(gpu.name)
    made = replace(node(name, count), memory_bytes=80 * GB)
    return replace(made, partitions=Partitions(gpu.name, some, have, CHANGES[change]))


def service(name: str = "s", rate: float = 4.0, model: str = "m", **limits: float) -> Service:
    """Return a service with one class of requests."""
    kind = RequestClass("only", 1.0, 100.0, 50.0, 0.5, limits.get("ttft_s", 2.0), limits.get("tpot_s", 0.1))
    return Service(name, model, rate, (kind,), limits.get("attainment", 0.99))


def fleet(*services: Service, nodes: tuple[NodeClass, ...] = (), period_s: float = 10.0) -> Fleet:
    """Return a fleet of these services."""
    return Fleet("small", nodes or (node(),), services or (service(),), period_s=period_s)


def two_kinds(rate: float = 6.0) -> tuple[Fleet, tuple[Profile, ...]]:
    """Return a fleet of fast and slow nodes with two services, and its profiles."""
    made = fleet(
        service("a", rate),
        service("b", rate / 2, tpot_s=0.05),
        nodes=(node("fast", 4), replace(node("slow", 6, 2), host_w=15.0, parked_w=25.0, bare_w=5.0)),
    )
    slow = replace(profile("slow", speed=0.5), power=StepPower(Line((1.0, 16.0), (70.0, 90.0)), 100.0))
    return made, (profile("fast"), slow)


class Fixed:
    """A policy that wants the same at all times, or one thing after another."""

    def __init__(self, *targets: tuple[float, Target]) -> None:
        self._targets, self._now = targets, 0.0

    def __call__(self, given: Given) -> Fixed:
        """Begin."""
        return self

    def observe(self, seen: Observation) -> None:
        """Take the time."""
        self._now = seen.now_s

    def decide(self) -> Target:
        """Return what is wanted by now."""
        return [target for at, target in self._targets if at <= self._now][-1]

    def explain(self) -> str:
        """Return no reason."""
        return "as the test says"


def point(made: Fleet, which: Profile, batch: int = 16, clock: Clock | None = None) -> OperatingPoint:
    """Return an operating point of a fleet."""
    kind = next(each for each in made.nodes if each.device == which.device)
    return OperatingPoint(which, kind, batch) if clock is None else OperatingPoint(which, kind, batch, clock)
