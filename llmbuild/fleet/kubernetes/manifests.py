"""The objects of a fleet as plain data: a Deployment for each replica, and what its services and its nodes need.

A replica has a Deployment of its own, named by its slot: one that is to end can be named, which a count of replicas
cannot do, and two orchestrators cannot fill one slot twice. While no orchestrator runs, Kubernetes keeps it alive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.fleet.actuators.interface import Slot, Start
from llmbuild.fleet.actuators.noted import fields_of, serve_words
from llmbuild.fleet.kubernetes.names import FLEET, MANAGED, REPLICA, SERVICE, Object, label_value, object_name
from llmbuild.spec.cluster import Cluster, Pods
from llmbuild.spec.fleet import Fleet, NodeClass

PORT = 8000
SETTLE_S = 5
"""Seconds before SIGTERM in which whoever sends requests by the Service learns that a pod ends."""
KILL_S = 5
"""Seconds beyond the drain after which a pod is killed."""
START_S = 600.0
"""Seconds that a server has at least to be ready; more where its variant loads for long."""
EVERY_S = 2
"""Seconds between two probes of a server that starts."""
_CATALOG, _KEYS, _KEYS_FILE = "/catalog", "/etc/llmbuild", "keys"
_OURS = "llmbuild/"
"""What our annotations begin with."""


@dataclass(frozen=True)
class Asked:
    """What replicas are started with beside the fleet file."""

    drain_s: float
    keys: str = ""
    """Digest of the API keys; empty where none is asked for."""


@dataclass(frozen=True)
class Noted:
    """What a Deployment's annotations say of its replica."""

    service: str
    variant: str
    batch: int
    clock_mhz: int
    node: str
    slot: int
    keys: str
    template: str
    """Digest of the template of its pods."""

    def annotations(self) -> dict[str, str]:
        """Return them as text."""
        return {
            f"{_OURS}service": self.service,
            f"{_OURS}variant": self.variant,
            f"{_OURS}batch": str(self.batch),
            f"{_OURS}clock-mhz": str(self.clock_mhz),
            f"{_OURS}node": self.node,
            f"{_OURS}slot": str(self.slot),
            f"{_OURS}keys": self.keys,
            f"{_OURS}template": self.template,
        }

    @staticmethod
    def read(one: Object) -> Noted | None:
        """Return what an object's annotations say; None where one is missing or no number."""
        found = one["metadata"].get("annotations") or {}
        try:
            return Noted(
                service=found[f"{_OURS}service"],
                variant=found[f"{_OURS}variant"],
                batch=int(found[f"{_OURS}batch"]),
                clock_mhz=int(found[f"{_OURS}clock-mhz"]),
                node=found[f"{_OURS}node"],
                slot=int(found[f"{_OURS}slot"]),
                keys=found[f"{_OURS}keys"],
                template=found[f"{_OURS}template"],
            )
        except (KeyError, ValueError):
            return None


def cluster_of(fleet: Fleet, keys: str = "") -> Cluster:
    """Return the cluster of a fleet whose gateway takes keys of a digest.

    Raises:
        InputError: the file does not say enough, or the gateway and its replicas would ask for other keys.
    """
    if fleet.cluster is None:
        told = "kubernetes: {image: IMAGE, namespace: NAMESPACE, claim: CLAIM}"
        raise InputError(f"fleet {fleet.name} says nothing of Kubernetes: give `{told}`")
    for kind in fleet.nodes:
        if kind.pods is None:
            raise InputError(
                f"class {kind.name} says nothing of Kubernetes: give `kubernetes: {{cpus: N, labels: ...}}`"
            )
    if bool(keys) != bool(fleet.cluster.api_keys):
        told = "the file names no Secret with the keys" if keys else "the gateway asks for none"
        raise InputError(f"API keys: {told}: give both --api-keys FILE and `kubernetes.api_keys: SECRET`, or neither")
    return fleet.cluster


def replica_name(fleet: Fleet, slot: Slot) -> str:
    """Return the name of the Deployment on a slot."""
    return object_name(fleet.name, slot.node, str(slot.index))


def replica(fleet: Fleet, start: Start, asked: Asked) -> Object:
    """Return the Deployment of a replica."""
    service, name = fleet.services[start.service], replica_name(fleet, start.slot)
    own = {**labels_of(fleet, "replica"), SERVICE: label_value(service.name), REPLICA: name}
    template = {"metadata": {"labels": own}, "spec": _pod(fleet, start, asked)}
    noted = Noted(template=digest.of(template)[:32], **fields_of(fleet, start, asked.keys))
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {**_named(fleet, name), "labels": own, "annotations": noted.annotations()},
        "spec": {
            "replicas": 1,
            "revisionHistoryLimit": 0,
            "strategy": {"type": "Recreate"},  # there is one slot: the next pod cannot start beside the last
            "selector": {"matchLabels": {MANAGED: "llmbuild", FLEET: own[FLEET], REPLICA: name}},
            "template": template,
        },
    }


def _pod(fleet: Fleet, start: Start, asked: Asked) -> Object:
    cluster, pods = cluster_of(fleet, asked.keys), _pods(start.point.node)
    keys = [{"name": "keys", "secret": {"secretName": cluster.api_keys}}] if cluster.api_keys else []
    claim = {"claimName": cluster.claim, "readOnly": True}
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": math.ceil(asked.drain_s) + SETTLE_S + KILL_S,
        "nodeSelector": dict(pods.labels),
        **_some("tolerations", [{"key": key, "operator": "Exists"} for key in pods.tolerates]),
        **_some("imagePullSecrets", [{"name": name} for name in cluster.pull_secrets]),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": cluster.user,
            "runAsGroup": cluster.user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(fleet, start, asked, cluster, pods)],
        "volumes": [
            {"name": "catalog", "persistentVolumeClaim": claim},
            {"name": "tmp", "emptyDir": {}},
            *keys,
        ],
    }


def _container(fleet: Fleet, start: Start, asked: Asked, cluster: Cluster, pods: Pods) -> Object:
    amounts = {
        "cpu": str(pods.cpus),
        "memory": str(int(pods.memory_bytes)),
        **{name: str(count) for name, count in pods.resources},
    }
    keys = [{"name": "keys", "mountPath": _KEYS, "readOnly": True}] if cluster.api_keys else []
    most_s = max(START_S, 3 * start.point.profile.load_s)
    return {
        "name": "server",
        "image": cluster.image,
        "command": ["llmbuild"],
        "args": _words(fleet, start, asked, cluster),
        "ports": [{"name": "http", "containerPort": PORT}],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": amounts, "limits": amounts},  # equal: whole cores may be pinned by the node
        "startupProbe": _probe("/ready", EVERY_S, math.ceil(most_s / EVERY_S)),
        "readinessProbe": _probe("/ready", 2, 3),
        "livenessProbe": _probe("/health", 10, 6),
        "lifecycle": {"preStop": {"sleep": {"seconds": SETTLE_S}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "catalog", "mountPath": _CATALOG, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            *keys,
        ],
    }


def _words(fleet: Fleet, start: Start, asked: Asked, cluster: Cluster) -> list[str]:
    keys = ["--api-keys", f"{_KEYS}/{_KEYS_FILE}"] if cluster.api_keys else []
    return [*serve_words(fleet, start, _CATALOG, ("0.0.0.0", PORT), asked.drain_s), *keys]


def _probe(path: str, every_s: int, failures: int) -> Object:
    asks = {"path": path, "port": "http"}
    return {"httpGet": asks, "periodSeconds": every_s, "timeoutSeconds": 5, "failureThreshold": failures}


# --- what stands beside the replicas ---------------------------------------------------------------------------------


def services(fleet: Fleet) -> list[Object]:
    """Return a Service for each service, and a bound on how many of its replicas are moved at a time."""
    found: list[Object] = []
    for one in fleet.services:
        name, chosen = object_name(fleet.name, one.name), _chosen(fleet, one.name)
        metadata = {**_named(fleet, name), "labels": {**labels_of(fleet, "service"), SERVICE: chosen[SERVICE]}}
        ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
        bound = {"maxUnavailable": 1, "selector": {"matchLabels": chosen}}
        found += [
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"selector": chosen, "ports": ports}},
            {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata, "spec": bound},
        ]
    return found


def pools(fleet: Fleet, picker: str) -> list[Object]:
    """Return an InferencePool for each service, whose endpoint picker is a Service of that name."""
    return [
        {
            "apiVersion": "inference.networking.k8s.io/v1",
            "kind": "InferencePool",
            "metadata": {**_named(fleet, object_name(fleet.name, one.name)), "labels": labels_of(fleet, "pool")},
            "spec": {
                "selector": {"matchLabels": _chosen(fleet, one.name)},
                "targetPorts": [{"number": PORT}],
                "endpointPickerRef": {"name": picker, "port": {"number": 9002}, "failureMode": "FailOpen"},
            },
        }
        for one in fleet.services
    ]


def access(fleet: Fleet) -> list[Object]:
    """Return what an orchestrator within the cluster must be allowed; nothing where the file names no account."""
    cluster = cluster_of(fleet, fleet.cluster.api_keys if fleet.cluster else "")
    if not cluster.service_account:
        return []
    role, wide = object_name(fleet.name, "orchestrator"), object_name(fleet.name, cluster.namespace, "nodes")
    account = {"kind": "ServiceAccount", "name": cluster.service_account, "namespace": cluster.namespace}
    labels = labels_of(fleet, "orchestrator")
    own, of_all = {**_named(fleet, role), "labels": labels}, {"name": wide, "labels": labels}
    rights = [
        {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["list", "create", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "delete"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
    ]
    sees = [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]
    rbac, v1 = "rbac.authorization.k8s.io", "rbac.authorization.k8s.io/v1"
    named = {**_named(fleet, cluster.service_account), "labels": labels}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named},
        {"apiVersion": v1, "kind": "Role", "metadata": own, "rules": rights},
        {
            "apiVersion": v1,
            "kind": "RoleBinding",
            "metadata": own,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": role},
            "subjects": [account],
        },
        {"apiVersion": v1, "kind": "ClusterRole", "metadata": of_all, "rules": sees},
        {
            "apiVersion": v1,
            "kind": "ClusterRoleBinding",
            "metadata": of_all,
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": wide},
            "subjects": [account],
        },
    ]


def all_objects(fleet: Fleet, starts: Sequence[Start], asked: Asked, picker: str = "") -> list[Object]:
    """Return every object of a fleet with these replicas; with a `picker` also pools for a gateway of the cluster."""
    found = [*access(fleet), *services(fleet), *(pools(fleet, picker) if picker else ())]
    return [*found, *(replica(fleet, start, asked) for start in starts)]


def _named(fleet: Fleet, name: str) -> Object:
    assert fleet.cluster is not None
    return {"name": name, "namespace": fleet.cluster.namespace}


def labels_of(fleet: Fleet, component: str) -> dict[str, str]:
    """Return the labels of an object of a fleet."""
    return {
        "app.kubernetes.io/name": "llmbuild",
        "app.kubernetes.io/instance": label_value(fleet.name),
        "app.kubernetes.io/component": component,
        MANAGED: "llmbuild",
        FLEET: label_value(fleet.name),
    }


def _chosen(fleet: Fleet, service: str) -> dict[str, str]:
    return {MANAGED: "llmbuild", FLEET: label_value(fleet.name), SERVICE: label_value(service)}


def _some(key: str, values: list[Object]) -> Object:
    """Return a list under its key; nothing where it is empty, as the server would not keep it."""
    return {key: values} if values else {}


def _pods(kind: NodeClass) -> Pods:
    assert kind.pods is not None
    return kind.pods
