"""Agents as actors of a real cluster of Ray: one home of its actors, its numbers and its errors.

Agents are detached, so they outlive who started them. The lock is an actor that is not: it ends with its driver. Only
one actor of a name can be in a namespace, so of two orchestrators one gets it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmbuild.fleet.ray.agent import Agent
from llmbuild.fleet.ray.cluster import Host, Lost, Needs, Order, Refused, Told
from llmbuild.process.rays import at_node, connected, told_of

_LOCK = "orchestrator"
_S = 10.0
"""Seconds that an answer of a single actor may take."""
_BEGIN_S = 60.0
"""Seconds that the lock has to begin: its node starts a process for it."""


class _Holder:
    """The lock: it holds nothing but its name."""

    def here(self) -> bool:
        """Say that it is there."""
        return True


class RayCluster:
    """The agents of one fleet. One class would be two: the lock is an actor as they are."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._handles: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}
        """Questions without an answer yet."""
        self._lock: Any = None

    # --- the lock ----------------------------------------------------------------------------------------------------

    def lock(self) -> bool:
        """Take the right to run the fleet; return whether it was free."""
        ray = self._ray
        try:
            self._lock = ray.remote(_Holder).options(name=_LOCK, num_cpus=0, **self._at_home()).remote()
        except ValueError:  # the name is taken
            return False
        try:
            ray.get(self._lock.here.remote(), timeout=_BEGIN_S)
        except ray.exceptions.RayError:
            self.unlock()
            return False
        return True

    def _at_home(self) -> dict[str, Any]:
        """Return the place of the lock: this driver's node, whose end it would not outlive anyway."""
        here = self._ray.get_runtime_context().get_node_id()
        return {"scheduling_strategy": at_node(here)}

    def locked(self) -> bool:
        """Return whether the lock is still held."""
        try:
            self._ray.get(self._lock.here.remote(), timeout=_S)
        except self._ray.exceptions.GetTimeoutError:
            return True  # a busy cluster: nobody else can have its name
        except self._ray.exceptions.RayError:
            return False
        return True

    def unlock(self) -> None:
        """Give it back."""
        with contextlib.suppress(Exception):
            self._ray.kill(self._lock)

    # --- nodes and agents --------------------------------------------------------------------------------------------

    def hosts(self) -> Sequence[Host]:
        """Return the nodes that are alive, by the order in which Ray tells them.

        Raises:
            Refused: the cluster does not answer.
        """
        try:
            nodes = self._ray.nodes()
        except (self._ray.exceptions.RayError, RuntimeError, ConnectionError) as error:
            raise Refused(told_of(error)) from None
        return [Host(one["NodeID"], one["NodeManagerAddress"], dict(one["Resources"])) for one in nodes if one["Alive"]]

    def names(self) -> Sequence[str]:
        """Return the agents that are there."""
        return [name for name in self._ray.util.list_named_actors() if name != _LOCK]

    def launch(self, order: Order, needs: Needs) -> None:
        """Start an agent.

        Raises:
            Refused: the cluster does not answer.
        """
        made = self._ray.remote(Agent).options(
            name=order.name,
            lifetime="detached",
            max_restarts=0,
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            resources={needs.resource: 1},
            scheduling_strategy=at_node(order.noted.host),
        )
        try:
            self._handles[order.name] = made.remote(order)
        except (ValueError, self._ray.exceptions.RayError) as error:
            raise Refused(told_of(error)) from None

    def look(self, names: Collection[str], seconds: float) -> Mapping[str, Told | Lost]:
        """Return what agents say within that time; each has at most one question that is not answered yet."""
        found: dict[str, Told | Lost] = {}
        for name in names:
            if name in self._asked:
                continue
            try:
                self._asked[name] = self._handle(name).told.remote()
            except (ValueError, self._ray.exceptions.RayError) as error:
                found[name] = Lost(told_of(error))
        refs = {self._asked[name]: name for name in names if name in self._asked}
        if not refs:
            return found
        done, _ = self._ray.wait(list(refs), num_returns=len(refs), timeout=seconds)
        for ref in done:
            name = refs[ref]
            del self._asked[name]
            if (told := self._answer(ref)) is not None:
                found[name] = told
        self._forget(name for name, told in list(found.items()) if isinstance(told, Lost))
        return found

    def _answer(self, ref: Any) -> Told | Lost | None:
        """Return what an agent says; None where it cannot be reached, which may pass, or its node is lost."""
        try:
            told: Told = self._ray.get(ref, timeout=_S)
        except self._ray.exceptions.ActorUnavailableError:
            return None
        except self._ray.exceptions.RayError as error:
            return Lost(told_of(error))
        return told

    def _forget(self, names: Any) -> None:
        for name in names:
            self._handles.pop(name, None)
            self._asked.pop(name, None)

    def stop(self, name: str) -> None:
        """Let an agent drain its server.

        Raises:
            Refused: there is no such agent.
        """
        try:
            self._handle(name).stop.remote()
        except (ValueError, self._ray.exceptions.RayError) as error:
            raise Refused(told_of(error)) from None

    def kill(self, name: str) -> None:
        """End an agent at once; one that is gone is ended."""
        with contextlib.suppress(ValueError, self._ray.exceptions.RayError):
            self._ray.kill(self._handle(name), no_restart=True)

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            self._handles[name] = self._ray.get_actor(name)
        return self._handles[name]


def cluster_of(address: str, fleet: str) -> RayCluster:
    """Return the agents of a fleet on the cluster of an address.

    Raises:
        InputError: Ray is not installed, or no cluster answers.
    """
    return RayCluster(connected(address, f"llmbuild-{fleet}"))
