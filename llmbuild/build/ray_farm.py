"""A farm on a cluster of Ray: compiles as tasks on any node, and which device a target is measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from llmbuild.compiler.afar import TRIES, Gone, Made, Sent, work
from llmbuild.errors import InputError
from llmbuild.process.rays import connected, this_node, told_of
from llmbuild.profiler.leased import DEVICE, Leased, needs_of
from llmbuild.profiler.remote import Place

_NAMESPACE = "llmbuild-build"


class RayFarm:
    """Compiles as tasks that take a CPU each: Ray begins one again elsewhere when its node is lost."""

    def __init__(self, ray: Any, address: str) -> None:
        self._ray, self._address = ray, address
        self._work = ray.remote(_worked).options(max_retries=TRIES, num_cpus=1)

    @staticmethod
    def at(address: str) -> RayFarm:
        """Return the cluster of an address.

        Raises:
            InputError: Ray is not installed, or no cluster answers.
        """
        return RayFarm(connected(address, _NAMESPACE), address)

    def submit(self, sent: Sent) -> tuple[Callable[[], Made], Callable[[], None]]:
        """Begin a task; return what waits for it, and what cancels it."""
        ref = self._work.remote(sent)
        return partial(self._wait, ref), partial(self._cancel, ref)

    def _wait(self, ref: Any) -> Made:
        try:
            made: Made = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            raise Gone(f"a compile was begun {1 + TRIES} times or cancelled: {told_of(error)}") from None
        return made

    def _cancel(self, ref: Any) -> None:
        self._ray.cancel(ref, force=True)

    def device(self, target: str) -> Place:
        """Return a device for a target; which, Ray decides: one that is free, if any.

        Raises:
            InputError: no node has such a device.
        """
        needs = needs_of(target)
        lacking(self._ray.nodes(), needs)
        asked = self._ray.remote(this_node).options(num_cpus=0, resources=needs, max_retries=TRIES)
        node = self._ray.get(asked.remote())
        return Leased(destination=self._address, node=node, target=target, leased=True)


def _worked(sent: Sent) -> Made:
    """Do the work on the node where Ray runs this."""
    return work(sent, this_node()[:8])


def lacking(nodes: Sequence[Mapping[str, Any]], needs: Mapping[str, float]) -> None:
    """Refuse what no node of a cluster has.

    Raises:
        InputError: with the resources that are missing.
    """
    for one in nodes:
        if one["Alive"] and all(one["Resources"].get(name, 0) >= amount for name, amount in needs.items()):
            return
    wanted = ", ".join(f'"{name}": 1' for name in needs)
    told = (
        f"no node of this cluster of Ray has a device to measure on: `ray start --resources '{{{wanted}}}'` gives one"
    )
    raise InputError(f"{told}; with --until compile nothing is measured" if DEVICE in needs else told)
