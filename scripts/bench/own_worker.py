"""Run one of llmbuild's variants under the requests of peer_worker.py: `open` a session, then `round` after `round`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peer_worker import Request, Runner, Step, serve

from llmbuild.runtime import host
from llmbuild.runtime.session import Session, Settings
from llmbuild.spec.program import abi_from


def loader(request: Request) -> tuple[Callable[[], Step], str]:
    """Return what opens {artifact, parameters, abi, driver, workers}, and the runtime's version."""

    def load() -> Step:
        session = Session(
            Path(request["artifact"]),
            Path(request["parameters"]),
            abi_from(request["abi"]),
            Settings(request["driver"], request["workers"]),
        )

        def step(tokens: list[int], past: int) -> None:
            if len(tokens) == 1:
                session.decode(tokens[0], past)
            else:
                session.prefill(tokens, past)

        return step

    return load, host.runtime_version()


def main() -> None:
    """Serve one variant."""
    runner = Runner(loader)
    serve({"open": runner.open, "round": runner.round})


if __name__ == "__main__":
    main()
