"""Where a fleet runs on Kubernetes: the namespace and image of its replicas, and what each class of nodes takes."""

from __future__ import annotations

from dataclasses import dataclass

BESIDE_BYTES = 1e9
"""Memory of a pod beside that of its slot, where the file does not say: the interpreter, modules and buffers."""


@dataclass(frozen=True)
class Cluster:
    """What the replicas of a fleet share in a cluster."""

    image: str
    """Has the command `llmbuild` with the extra `serve`."""
    namespace: str
    claim: str
    """PersistentVolumeClaim of the catalog; replicas mount it for reading."""
    user: int = 65532
    """User and group by number under which replicas run."""
    api_keys: str = ""
    """Secret whose entry `keys` is the file of API keys; empty: none is asked for."""
    pull_secrets: tuple[str, ...] = ()
    """Secrets by which the image is pulled."""
    service_account: str = ""
    """Account of an orchestrator within the cluster; empty: it runs elsewhere."""


@dataclass(frozen=True)
class Pods:
    """What a replica on one slot of a class of nodes asks of the cluster."""

    cpus: int
    """Whole cores."""
    memory_bytes: float
    labels: tuple[tuple[str, str], ...] = ()
    """Of the nodes of the class."""
    resources: tuple[tuple[str, int], ...] = ()
    """Devices of a slot, by the names under which nodes offer them."""
    tolerates: tuple[str, ...] = ()
    """Keys of taints of the nodes."""
