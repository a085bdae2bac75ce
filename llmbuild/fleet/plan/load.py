"""What a plan is made for: the rate and the lengths of every class of requests."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmbuild.spec.fleet import Fleet, RequestClass


@dataclass(frozen=True)
class Demand:
    """Requests a second of one class of a service; the class has the lengths that are planned for."""

    service: str
    kind: RequestClass
    rate: float


@dataclass(frozen=True)
class Load:
    """The demand of every class of every service, in the order of the fleet file."""

    demands: tuple[Demand, ...]

    def times(self, factor: float) -> Load:
        """Return the load with every rate scaled."""
        return Load(tuple(replace(each, rate=each.rate * factor) for each in self.demands))

    @property
    def rate(self) -> float:
        """Return all requests a second."""
        return sum(each.rate for each in self.demands)


def stated(fleet: Fleet) -> Load:
    """Return the load that the fleet file states."""
    return Load(tuple(Demand(s.name, kind, s.rate * kind.share) for s in fleet.services for kind in s.classes))
