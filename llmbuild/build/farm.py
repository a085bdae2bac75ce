"""A build on a cluster: compiles on any node, and one device for each target that is measured.

Whose cluster it is, Ray's or Slurm's, is behind one interface; all that the build path sees is here.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

from llmbuild.compiler.afar import Afar, Farm
from llmbuild.process.rays import is_ray
from llmbuild.process.slurm import is_slurm
from llmbuild.profiler.remote import Place, Remote


class Lender(Farm, Protocol):
    """A farm that lends devices too."""

    def device(self, target: str) -> Place:
        """Return a device that is right for a target, to be held whenever it is connected to.

        Raises:
            InputError: there is none.
        """


class Cluster:
    """The cluster of one command."""

    def __init__(self, farm: Lender) -> None:
        self._farm = farm
        self.run = Afar(farm)
        self._remotes: dict[str, Remote] = {}

    def remote(self, target: str) -> Remote:
        """Return the device that measures a target, always the same one: rows of a build are of one machine.

        Raises:
            InputError: no node has such a device.
        """
        if target not in self._remotes:
            self._remotes[target] = Remote(self._farm.device(target))
        return self._remotes[target]


def is_cluster(text: str) -> bool:
    """Return whether a text names a cluster, not a machine."""
    return is_ray(text) or is_slurm(text)


@cache
def cluster_of(text: str) -> Cluster:
    """Return the cluster that a text names, connected once.

    Raises:
        InputError: its library is not installed, no cluster answers, or the text is not of its form.
    """
    if is_slurm(text):
        from llmbuild.build.slurm_farm import SlurmFarm

        return Cluster(SlurmFarm.at(text))
    from llmbuild.build.ray_farm import RayFarm

    return Cluster(RayFarm.at(text))
