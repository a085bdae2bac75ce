"""The services of a fleet by whole models and by operators: what operators apart would save, or why it is not known.

Each service is judged alone, on all devices of one class of nodes, at its rate of the fleet file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmbuild.fleet.operators.cell import NETWORK, NVLINK, Link
from llmbuild.fleet.operators.plan import MODELS, OPERATORS, REPLICAS, CellPlan, table
from llmbuild.fleet.operators.profile import OperatorProfile
from llmbuild.fleet.operators.published import SHAPES, published
from llmbuild.spec.fleet import Fleet, NodeClass, Service

WITHIN = 4
"""Devices of a cell, at most: of one node, or where nodes have one each, of several."""


@dataclass(frozen=True)
class Compared:
    """Plans of one service on one class of nodes; each may choose the cells of the one before it, too."""

    service: Service
    node: str
    link: Link
    within: int
    """Devices of a cell, at most."""
    replicas: CellPlan
    """Whole models, each on one device."""
    models: CellPlan
    """Whole models, also with each matrix over several devices."""
    operators: CellPlan
    """Operators apart, too; it is feasible."""
    basis: str
    """Of the seconds of operators, in words."""

    @property
    def saved_devices(self) -> float | None:
        """Return the share of the devices of whole models that is saved; None where these have no plan."""
        return 1 - self.operators.devices / self.models.devices if self.models.feasible else None

    @property
    def saved_joules(self) -> float | None:
        """Return the share of the joules of whole models that is saved, less than 0 where it takes more; or None."""
        return 1 - self.operators.watts / self.models.watts if self.models.feasible else None

    def joules(self, plan: CellPlan) -> float | None:
        """Return the joules of a plan for each token of an answer; None where there is no plan."""
        tokens = self.service.rate * sum(kind.share * kind.output for kind in self.service.classes)
        return plan.watts / tokens if plan.feasible and tokens else None


@dataclass(frozen=True)
class Unknown:
    """Why nothing can be said of a service on a class of nodes."""

    service: Service
    node: str
    reason: str


def by_services(fleet: Fleet) -> Iterator[Compared | Unknown]:
    """Yield for each service and each class of nodes what operators apart would save. Devices are not divided."""
    for service in fleet.services:
        for node in fleet.undivided().nodes:
            yield _compared(service, node)


def _compared(service: Service, node: NodeClass) -> Compared | Unknown:
    profiles = tuple(
        each for (device, model, _), each in published().items() if (device, model) == (node.device, service.model)
    )
    if not profiles:
        return Unknown(service, node.name, _lacking(service, node))
    if not node.count:
        return Unknown(service, node.name, "the fleet has no node of this class")
    if service.rate <= 0:
        return Unknown(service, node.name, "it has no requests")
    devices = node.count * node.slots
    link, together = (NVLINK[node.device], node.slots) if node.slots > 1 else (NETWORK, devices)
    within = min(WITHIN, together)
    mix = tuple((kind, kind.share) for kind in service.classes)
    profiles = tuple(each for each in profiles if each.shape.devices <= within)
    choices = table(profiles, _device(node), link, mix, service.attainment, within)
    replicas, models, operators = (choices.plan(service.rate, levels) for levels in (REPLICAS, MODELS, OPERATORS))
    if not operators.feasible:
        told = f"its {devices} devices do not take {service.rate:.3g} requests/s within the SLOs, in cells of {within}"
        return Unknown(service, node.name, f"{told} at most, however operators are placed")
    return Compared(service, node.name, link, within, replicas, models, operators, _basis(profiles))


def _lacking(service: Service, node: NodeClass) -> str:
    """Return which table there is not."""
    devices = sorted({device for device, _, _ in published()})
    if service.model not in SHAPES:
        return f"no operator table of model {service.model}: there are {', '.join(SHAPES)}"
    if node.device not in devices:
        return f"no operator table of device {node.device}: there are {', '.join(devices)}"
    return f"no operator table of {service.model} on {node.device}"


def _device(node: NodeClass) -> NodeClass:
    """Return one slot of a class as a node, with its share of the host, as often as there is one."""
    return replace(
        node, count=node.count * node.slots, slots=1, host_w=node.host_w / node.slots, clocks=(), cores=(), pods=None
    )


def _basis(profiles: tuple[OperatorProfile, ...]) -> str:
    return "; ".join(dict.fromkeys(each.told for each in profiles))
