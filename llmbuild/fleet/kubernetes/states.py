"""What a replica is, by what the cluster says of its Deployment, its pods and their nodes: a pure function."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from llmbuild.fleet.actuators.interface import State
from llmbuild.fleet.kubernetes.manifests import PORT
from llmbuild.fleet.kubernetes.names import Object

HOPELESS = (
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "CrashLoopBackOff",
)
"""Reasons for which a container waits that do not pass soon: another start, later or elsewhere, is the answer."""
UNSCHEDULABLE = "Unschedulable"
_TOLD = 200


@dataclass(frozen=True)
class Seen:
    """The state of a replica, and why."""

    state: State
    told: str = ""
    url: str = ""
    pod: str = ""
    """Unique number of its pod."""
    unplaced: bool = False
    """Whether no node takes it."""


def ending(one: Object) -> bool:
    """Return whether an object is being deleted."""
    return bool(one["metadata"].get("deletionTimestamp"))


def node_of(pod: Object) -> str:
    """Return the node of a pod; empty before it has one."""
    return str(pod.get("spec", {}).get("nodeName") or "")


def lost(nodes: Sequence[Object], pods: Sequence[Object]) -> set[str]:
    """Return the nodes of pods that are gone or not ready."""
    sound = {node["metadata"]["name"] for node in nodes if _condition(node, "Ready").get("status") == "True"}
    return {node_of(pod) for pod in pods} - sound - {""}


def seen(deployment: Object, pods: Sequence[Object], lost_nodes: Collection[str]) -> Seen:
    """Return what a replica is, by all pods that have its label.

    Those of an earlier Deployment of the same name are left out.
    """
    born = deployment["metadata"].get("creationTimestamp", "")
    own = [pod for pod in pods if pod["metadata"].get("creationTimestamp", "") >= born]
    if ending(deployment):
        left = [pod for pod in own if node_of(pod) not in lost_nodes]
        return Seen("draining") if left or not own else Seen("dead")
    there = [pod for pod in own if not ending(pod)]
    if not there:
        failed = _condition(deployment, "ReplicaFailure")
        told = _told(failed, "reason", "message") if failed.get("status") == "True" else ""
        return Seen("starting", told, unplaced=bool(told))
    return _of_pod(max(there, key=lambda pod: pod["metadata"].get("creationTimestamp", "")), lost_nodes)


def _of_pod(pod: Object, lost_nodes: Collection[str]) -> Seen:
    status, uid = pod.get("status", {}), str(pod["metadata"].get("uid", ""))
    if node_of(pod) in lost_nodes:
        return Seen("dead", f"node {node_of(pod)} is lost", pod=uid)
    if status.get("phase") == "Failed":
        return Seen("dead", _told(status, "reason", "message") or "its pod failed", pod=uid)
    container: Object = next(iter(status.get("containerStatuses") or ()), {})
    waits = (container.get("state") or {}).get("waiting") or {}
    if waits.get("reason") in HOPELESS:
        return Seen("dead", _why(container, waits), pod=uid)
    address = str(status.get("podIP") or "")
    if _condition(pod, "Ready").get("status") == "True" and address:
        host = f"[{address}]" if ":" in address else address
        return Seen("ready", url=f"http://{host}:{PORT}", pod=uid)
    placed = _condition(pod, "PodScheduled")
    unplaced = placed.get("status") == "False"
    return Seen("starting", _told(placed, "reason", "message") if unplaced else "", pod=uid, unplaced=unplaced)


def _why(container: Object, waits: Object) -> str:
    """Return why a container waits, and how it ended before."""
    last = (container.get("lastState") or {}).get("terminated") or {}
    ended = f"{last.get('reason', 'ended')}, exit code {last.get('exitCode')}" if last else ""
    return f"{waits['reason']}: {ended or _told(waits, 'message')}".rstrip(": ")


def _told(one: Object, *keys: str) -> str:
    return ": ".join(" ".join(str(one[key]).split())[:_TOLD] for key in keys if one.get(key))


def _condition(one: Object, kind: str) -> dict[str, Any]:
    return next((c for c in one.get("status", {}).get("conditions") or () if c.get("type") == kind), {})
