"""What a fleet's command does on other machines: access to Kubernetes and to Ray, and the objects of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmbuild.cli.options import PATH
from llmbuild.errors import InputError
from llmbuild.process.rays import is_ray
from llmbuild.system.extras import EXTRAS

if TYPE_CHECKING:
    from llmbuild.fleet.orchestrate import Make, Setup
    from llmbuild.fleet.ray.backend import Ray
    from llmbuild.spec.fleet import Profile

F = TypeVar("F", bound=Callable[..., object])
_OPTIONS = (
    click.option("--kubeconfig", type=PATH, metavar="FILE", help="Access to a cluster.  [default: as kubectl's]"),
    click.option("--context", metavar="NAME", help="Which cluster of the kubeconfig file."),
    click.option(
        "--inference-pool",
        "picker",
        metavar="SERVICE",
        help="With -n on Kubernetes: an InferencePool for each service, too, whose endpoint picker is SERVICE.",
    ),
)


class Backend(click.ParamType):  # type: ignore[type-arg]  # generic in later versions alone
    """What runs the replicas of a fleet."""

    name = "backend"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return its name, or the address of a cluster of Ray."""
        text = str(value)
        if text not in ("local", "kubernetes") and not is_ray(text):
            self.fail(f"{text!r} is none of local, kubernetes, ray and ray://HOST:PORT", param, ctx)
        return text


def cluster_options(command: F) -> F:
    """Add which cluster a fleet runs on."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def misplaced(options: Mapping[str, Any], backend: str, dry: bool) -> None:
    """Refuse options of a cluster where there is none.

    Raises:
        InputError: one is given on another backend, or where it says nothing.
    """
    given = [name for name in ("kubeconfig", "context") if options[name]]
    if given and (backend != "kubernetes" or dry):
        raise InputError(f"--{given[0]} goes with --on kubernetes, and without -n, which asks no cluster")
    if options["picker"] and not (backend == "kubernetes" and dry):
        raise InputError("--inference-pool goes with --on kubernetes -n, which prints the objects")


def manifests(setup: Setup, form: str | None, picker: str | None, tell: Callable[[str], None]) -> str:
    """Return the objects that a fleet's first decision needs, as `kubectl apply -f -` reads them.

    Raises:
        InputError: the fleet file does not say enough of Kubernetes.
    """
    from llmbuild.fleet.kubernetes.manifests import Asked, all_objects, cluster_of
    from llmbuild.fleet.kubernetes.planned import Planned
    from llmbuild.fleet.loop import permitted
    from llmbuild.fleet.orchestrate import dry
    from llmbuild.report.manifests import as_json, as_yaml

    asked, backend = Asked(setup.place.drain_s, setup.keys.digest), Planned()
    cluster_of(setup.fleet, asked.keys)
    dry(setup, tell, lambda setup, fleet: backend)
    _tell_absent(setup, [start.point.profile for start in backend.starts], tell)
    objects = all_objects(permitted(setup.fleet), backend.starts, asked, picker or "")
    return as_json(objects) if form else as_yaml(objects)


def _tell_absent(setup: Setup, profiles: Iterable[Profile], tell: Callable[[str], None]) -> None:
    """Tell which variants the catalog here does not have: the one that the cluster mounts must."""
    from llmbuild.fleet.profiles.measured import absent

    for each in dict.fromkeys((one.model, one.variant) for one in absent(setup.catalog, profiles)):
        told = f"{' '.join(each)} is not in the catalog at {setup.catalog}"
        tell(f"warning  {told}: where the claim's catalog lacks it too, no replica of it starts")


def on_cluster(options: Mapping[str, Any]) -> Make:
    """Return what makes the backend of a fleet on the cluster that the options name.

    Raises:
        InputError: the client's library is not installed.
    """
    missing = [name for name in EXTRAS["kubernetes"] if find_spec(name) is None]
    if missing:
        raise InputError(f"Kubernetes needs {', '.join(missing)}: pip install 'llmbuild[fleet,serve,kubernetes]'")
    from llmbuild.fleet.kubernetes.api import connected
    from llmbuild.fleet.kubernetes.backend import Kubernetes
    from llmbuild.fleet.kubernetes.manifests import Asked, cluster_of
    from llmbuild.fleet.orchestrate import to_stderr

    def make(setup: Setup, fleet: Any) -> Kubernetes:
        asked = Asked(setup.place.drain_s, setup.keys.digest)
        namespace = cluster_of(fleet, asked.keys).namespace
        _tell_absent(setup, setup.profiles, to_stderr)
        return Kubernetes(fleet, connected(namespace, options["kubeconfig"], options["context"]), asked)

    return make


def on_ray(address: str, dry: bool = False) -> Make:
    """Return what makes the backend of a fleet on a cluster of Ray; one that starts and ends nothing with `dry`."""

    def make(setup: Setup, fleet: Any) -> Ray:
        from llmbuild.fleet.ray.backend import Dry
        from llmbuild.fleet.ray.backend import Ray as Live
        from llmbuild.fleet.ray.client import cluster_of
        from llmbuild.fleet.ray.placing import checked

        checked(fleet)
        kind = Dry if dry else Live
        found = cluster_of(address, fleet.name)
        return kind(fleet, setup.catalog, found, setup.place.drain_s, setup.asked_of_replicas)

    return make
