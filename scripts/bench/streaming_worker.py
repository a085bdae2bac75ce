"""Only read as many bytes as a variant has: a lower bound of a decode step. Requests as for peer_worker.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peer_worker import Request, Runner, Step, serve

from llmbuild.kernels import limits
from llmbuild.profiler.limits import Calls
from llmbuild.runtime import host


def loader(request: Request) -> tuple[Callable[[], Step], str]:
    """Return what opens {artifact, read_bytes, threads}, a module of `llmbuild.kernels.limits`."""

    def load() -> Step:
        calls = Calls(Path(request["artifact"]), request["read_bytes"])
        name = limits.function(limits.READ, request["threads"])

        def step(tokens: list[int], past: int) -> None:
            calls.seconds(name)

        return step

    return load, host.runtime_version()


def main() -> None:
    """Serve one size."""
    runner = Runner(loader)
    serve({"open": runner.open, "round": runner.round})


if __name__ == "__main__":
    main()
