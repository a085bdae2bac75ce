"""All profiles of a fleet: those that its file gives, that were published, of a catalog, and estimates if asked for."""

from __future__ import annotations

from pathlib import Path

from llmbuild.errors import InputError
from llmbuild.fleet.profiles.divided import device_of, divided, parts_of
from llmbuild.fleet.profiles.estimated import estimated
from llmbuild.fleet.profiles.measured import measured
from llmbuild.fleet.profiles.published import published
from llmbuild.spec.fleet import Fleet, Profile


def profiles_of(fleet: Fleet, catalog: Path) -> tuple[Profile, ...]:
    """Return the profiles of a fleet's models on its devices; what the file gives stands for what was published.

    Estimates stand for nothing: a model gets them where it has no other profile, and only if the file asks for them.

    Raises:
        InputError: a model has no profile anywhere, what is to be estimated has no figures, or energy is asked for and
            a profile has no watts.
        CatalogError: a class of nodes names a machine of a catalog that cannot be read.
    """
    models = [service.model for service in fleet.services]
    devices = [device_of(node, part) for node in fleet.nodes for part in (None, *parts_of(node))]
    given = {(p.device, p.model, p.variant) for p in fleet.profiles}
    others = [p for p in published() if (p.device, p.model, p.variant) not in given]
    read = (*fleet.profiles, *others, *measured(catalog, fleet.nodes, models))
    all_ = (*read, *divided(fleet.nodes, read))
    found = tuple(p for p in all_ if p.model in models and p.device in devices)
    if fleet.estimates:
        found += tuple(estimated(fleet, found))
    for model in models:
        if not any(p.model == model for p in found):
            known = sorted({f"{p.model} on {p.device}" for p in all_})
            told = f"no profile of model {model} on any of {', '.join(sorted({n.device for n in fleet.nodes}))}"
            todo = "give one in `profiles`, or set `estimates: true`"
            if any(node.machine for node in fleet.nodes):
                todo = f"build it on that machine with `llmbuild build`, or {todo}"
            raise InputError(f"{told}: {todo}; there are {', '.join(known) or 'none'}")
    dark = next((p for p in found if p.power is None), None)
    if dark is not None and fleet.objective == "energy":
        told = f"no watts of {dark.variant} on {dark.device}, and the objective is energy"
        raise InputError(f"{told}: give `decode_w` and `prompt_w` of a profile, or `active` watts of the nodes")
    return found
