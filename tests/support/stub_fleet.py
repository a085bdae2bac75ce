"""`llmbuild orchestrate` over stub servers: the same runner, loop, gateway and backend, with nothing to build."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from llmbuild.fleet.actuators.interface import Start
from llmbuild.fleet.actuators.journal import Journal
from llmbuild.fleet.actuators.local import Local
from llmbuild.fleet.orchestrate import Setup, orchestrate, to_stderr
from llmbuild.serve.api.server import Place
from llmbuild.spec.fleet import Fleet
from tests.support.fleets import fleet, node, profile, service


class Stubbed(Local):
    """Starts stubs in place of servers."""

    def _words(self, action: Start) -> list[str]:
        return [str(Path(__file__).with_name("stub_server.py"))]


def stubbed(setup: Setup, fleet: Fleet) -> Stubbed:
    """Return the backend of a fleet."""
    return Stubbed(fleet, setup.catalog, Journal(setup.folder), setup.place.drain_s)


def setup(folder: Path, policy: str) -> Setup:
    """Return a fleet of two nodes whose load needs both."""
    cores = sorted(os.sched_getaffinity(0))
    kind = replace(node("core", 2), cores=((cores[0],), (cores[-1],)), machine=True, device="host/1", boot_s=0.1)
    made = fleet(service(rate=1e6), nodes=(kind,), period_s=0.5)
    return Setup(made, (profile("host/1"),), folder, folder / "state", policy, Place(port=0, drain_s=5.0))


def main(folder: str, policy: str) -> int:
    """Run it; print the address."""
    done = orchestrate(setup(Path(folder), policy), to_stderr, lambda url: print(url, flush=True), stubbed)
    return 0 if done else 130


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
