"""The Kubernetes backend: replicas are Deployments of one pod, and what runs is what the cluster says.

Nothing is kept here that the cluster does not know, but for how long what is not ready has been waited for: who comes
after a kill -9 lists the fleet's Deployments and goes on. An orchestrator that ends leaves its replicas, which serve.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from time import monotonic, sleep

from llmbuild.fleet.actuators.interface import APPLIED, NO_REPLICA, Answer, Live, Route, Start, Stop
from llmbuild.fleet.actuators.noted import known_of
from llmbuild.fleet.kubernetes.api import DEPLOYMENTS, NODES, PODS, Api, Refused
from llmbuild.fleet.kubernetes.lease import Lease
from llmbuild.fleet.kubernetes.manifests import START_S, Asked, Noted, cluster_of, labels_of, replica, replica_name
from llmbuild.fleet.kubernetes.names import REPLICA, Object, object_name, selector
from llmbuild.fleet.kubernetes.planned import Inert
from llmbuild.fleet.kubernetes.states import Seen, ending, lost, node_of, seen
from llmbuild.spec.fleet import Fleet, Profile

LOOK_S, NODES_S = 1.0, 10.0
"""Seconds between two looks at the replicas, and at the nodes."""
PLACED_S = 60.0
"""Seconds beyond the boot of a node after which a pod that no node takes is given up."""
EARLIER = "of an earlier fleet file"
DRAINED = {"propagationPolicy": "Foreground"}
"""The Deployment stays until its pod has ended, so that whoever looks sees that it drains."""
AT_ONCE = {"propagationPolicy": "Background"}
"""The Deployment goes, and its name with it: the slot is free."""
KILLED = {"gracePeriodSeconds": 0}


@dataclass
class _Replica:
    """A replica, and since when it has been waited for."""

    live: Live
    uid: str
    """Unique number of its Deployment; empty until that is listed."""
    since_s: float
    pod: str = ""


class Kubernetes(Inert):
    """Starts and ends replicas in a cluster. One class: replicas, deletions and looks change together."""

    def __init__(
        self,
        fleet: Fleet,
        api: Api,
        asked: Asked,
        clock: Callable[[], float] = monotonic,
        wait: Callable[[float], None] = sleep,
    ) -> None:
        cluster = cluster_of(fleet, asked.keys)
        self._fleet, self._api, self._asked, self._clock, self._wait = fleet, api, asked, clock, wait
        self._lease = Lease(api, object_name(fleet.name, "lease"), labels_of(fleet, "orchestrator"), clock)
        self._profiles: Sequence[Profile] | None = None
        """None before what is there is adopted: until then nothing is known, and nothing ended."""
        self._replicas: dict[str, _Replica] = {}
        self._deleted: dict[str, Object] = {}
        """Options by which Deployments were deleted that are no replicas any more, by unique number."""
        self._nodes: Sequence[Object] | None = ()
        """None where they may not be listed."""
        self._looked_s = self._noded_s = float("-inf")
        self._held = False
        told = f"kubectl -n {cluster.namespace} delete deployments -l {selector(fleet.name)}"
        self.ending = f"requests are finished; replicas stay: `{told}` ends them"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other orchestrators away by a lease.

        Raises:
            InputError: another one runs, or the server gives no lease.
        """
        self._lease.take(self._wait)
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._lease.release()

    # --- actions -----------------------------------------------------------------------------------------------------

    def start(self, action: Start) -> Answer:
        """Create the Deployment of a slot."""
        name = replica_name(self._fleet, action.slot)
        if name in self._replicas:
            return Answer("unsupported", f"{action.slot.name} has a replica")
        try:
            made = self._api.create(DEPLOYMENTS, replica(self._fleet, action, self._asked))
        except Refused as error:  # if it was created all the same, the next look finds it
            taken = f"{name} is there still, and is being deleted" if error.status == HTTPStatus.CONFLICT else ""
            return Answer("unsupported", taken or str(error))
        live = Live(name, action.service, action.point, action.slot, "starting")
        self._replicas[name] = _Replica(live, str(made["metadata"].get("uid", "")), self._clock())
        return replace(APPLIED, reason=f"deployment {name}")

    def stop(self, action: Stop) -> Answer:
        """Let a Deployment be deleted: its pod gets SIGTERM, and its time."""
        one = self._replicas.get(action.replica)
        if one is None:
            return Answer("unsupported", f"there is no replica {action.replica}")
        if one.live.state == "draining":
            return APPLIED
        try:
            self._api.delete(DEPLOYMENTS, one.live.name, _this(one.uid, DRAINED))
        except Refused as error:
            return Answer("unsupported", str(error))
        one.live = replace(one.live, state="draining")
        return APPLIED

    def route(self, action: Route) -> Answer:
        """Agree: the gateway routes."""
        return APPLIED if action.replica in self._replicas else NO_REPLICA

    # --- what is there -----------------------------------------------------------------------------------------------

    def adopt(self, profiles: Sequence[Profile], dry: bool = False) -> list[tuple[str, str]]:
        """Take over the fleet's Deployments, and end those that no slot is for; return each with what was done.

        One whose template is of an earlier fleet file serves until another has taken its place. Where the server does
        not answer, `live` takes over what it finds.
        """
        self._profiles = profiles
        try:
            there = self._api.listed(DEPLOYMENTS, selector(self._fleet.name))
            self._look_at_nodes(())
        except Refused as error:
            return [("later", str(error))]
        told = [self._met(one) for one in there if not ending(one)]
        if self._nodes is None:
            told.append(("nodes", "may not be listed: the loss of one is seen when Kubernetes moves its pods"))
        return told

    def live(self) -> Sequence[Live]:
        """Return the replicas; one that has ended is among them once, as dead.

        Raises:
            InputError: another orchestrator has taken over.
            Refused: the server does not answer.
        """
        if self._held:
            self._lease.renew()
        now = self._clock()
        if now - self._looked_s < LOOK_S:
            return [one.live for one in self._replicas.values()]
        deployments = self._api.listed(DEPLOYMENTS, selector(self._fleet.name))
        pods = self._api.listed(PODS, selector(self._fleet.name))
        self._look_at_nodes(pods)
        gone = set() if self._nodes is None else lost(self._nodes, pods)
        self._looked_s = now
        self._end_again(deployments, pods, gone)
        there = {one["metadata"]["name"]: one for one in deployments if one["metadata"]["uid"] not in self._deleted}
        for name, deployment in there.items():
            if self._profiles is not None and name not in self._replicas and not ending(deployment):
                self._met(deployment)  # applied by somebody, or by us without an answer
        found = [self._now(one, there.get(name), pods, gone) for name, one in list(self._replicas.items())]
        for one in found:
            if one.state == "dead":
                self._forget(one.name)
        return found

    def _look_at_nodes(self, pods: Sequence[Object]) -> None:
        """List the nodes where it is time, or where a pod is on one that is not known."""
        now = self._clock()
        names = {node["metadata"]["name"] for node in self._nodes or ()}
        new = self._nodes is not None and bool({node_of(pod) for pod in pods} - names - {""})
        if now - self._noded_s < NODES_S and not new:
            return
        self._noded_s = now
        try:
            self._nodes = self._api.listed(NODES)
        except Refused as error:
            if error.status != HTTPStatus.FORBIDDEN:
                raise
            self._nodes = None

    def _now(self, one: _Replica, deployment: Object | None, pods: Sequence[Object], gone: Collection[str]) -> Live:
        """Return a replica as the cluster has it now."""
        if deployment is None or (one.uid and deployment["metadata"]["uid"] != one.uid):
            told = "" if one.live.state == "draining" else "its Deployment was deleted"
            return replace(one.live, state="dead", told=told, url="")
        one.uid = deployment["metadata"]["uid"]
        own = [pod for pod in pods if (pod["metadata"].get("labels") or {}).get(REPLICA) == one.live.name]
        what, now = seen(deployment, own, gone), self._clock()
        if what.state == "ready" and one.pod not in ("", what.pod):
            what = replace(what, state="starting", url="")  # for one look: requests leave the place of the pod before
        if what.state == "ready" or (what.pod and what.pod != one.pod):
            one.since_s = now
        one.pod = what.pod or one.pod
        what = self._given_up(one, what, now)
        one.live = replace(one.live, state=what.state, url=what.url, told=what.told)
        return one.live

    def _given_up(self, one: _Replica, what: Seen, now: float) -> Seen:
        """Return a state; dead where it has been waited for long enough."""
        point, waited = one.live.point, now - one.since_s
        most_s = PLACED_S + point.node.boot_s if what.unplaced else max(START_S, 3 * point.profile.load_s)
        if what.state != "starting" or waited < most_s:
            return what
        return replace(what, state="dead", told=what.told or f"not ready for {waited:.0f} s")

    def _forget(self, name: str) -> None:
        """Delete the Deployment of a replica that is dead, now or as soon as the server does it."""
        one = self._replicas.pop(name)
        if one.uid:
            self._deleted[one.uid] = AT_ONCE
            self._delete(name, one.uid)

    def _end_again(self, deployments: Sequence[Object], pods: Sequence[Object], gone: Collection[str]) -> None:
        """Delete what could not be deleted before, and pods that no node will ever end."""
        there = {one["metadata"]["uid"]: one for one in deployments}
        self._deleted = {uid: how for uid, how in self._deleted.items() if uid in there}
        for uid in self._deleted:
            if not ending(there[uid]):
                self._delete(there[uid]["metadata"]["name"], uid)
        for pod in pods:
            if ending(pod) and node_of(pod) in gone:
                with contextlib.suppress(Refused):
                    self._api.delete(PODS, pod["metadata"]["name"], _this(pod["metadata"]["uid"], KILLED))

    def _delete(self, name: str, uid: str) -> None:
        with contextlib.suppress(Refused):  # the next look does it again
            self._api.delete(DEPLOYMENTS, name, _this(uid, self._deleted[uid]))

    # --- what was there before ---------------------------------------------------------------------------------------

    def _met(self, deployment: Object) -> tuple[str, str]:
        """Take over a Deployment, or end it where no slot is for it; return its name and which was done."""
        name, uid = deployment["metadata"]["name"], deployment["metadata"]["uid"]
        noted = Noted.read(deployment)
        live = None if noted is None else self._known(name, noted)
        if live is None:
            self._deleted[uid] = DRAINED
            self._delete(name, uid)
            return name, "ended: of no service, variant, slot or API keys of this fleet"
        self._replicas[name] = _Replica(live, uid, self._clock())
        earlier = f", {EARLIER}: to be replaced" if live.point.profile.source.endswith(EARLIER) else ""
        return name, f"adopted: {live.point.name} on {live.slot.name}{earlier}"

    def _known(self, name: str, noted: Noted) -> Live | None:
        """Return the replica that annotations tell of; None where this fleet has no such service, slot or variant."""
        known = known_of(noted, self._fleet, self._profiles or (), self._asked.keys)
        if known is None or name != replica_name(self._fleet, known[2]):
            return None
        service, point, slot = known
        made = replica(self._fleet, Start(service, point, slot, ""), self._asked)
        if Noted.read(made) != noted:  # no target has this point, so the loop starts another one and drains this
            point = replace(point, profile=replace(point.profile, source=f"{point.profile.source}, {EARLIER}"))
        return Live(name, service, point, slot, "starting")


def _this(uid: str, how: Object) -> Object:
    """Return options of a deletion that hold for the object of a unique number, and for no later one of its name."""
    return {**how, "preconditions": {"uid": uid}} if uid else dict(how)
