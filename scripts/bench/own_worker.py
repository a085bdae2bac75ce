"""Run one of llmbuild's variants under the requests of peer_worker.py: `open`, `round` after `round`, `score`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from comparison import scoring
from numpy.typing import NDArray
from peer_worker import Request, Runner, Step, serve

from llmbuild.runtime import host
from llmbuild.runtime.session import Session, Settings
from llmbuild.spec.program import abi_from


def opened(request: Request) -> Session:
    """Open {artifact, parameters, abi, driver, workers}."""
    settings = Settings(request["driver"], request["workers"])
    return Session(Path(request["artifact"]), Path(request["parameters"]), abi_from(request["abi"]), settings)


def loader(request: Request) -> tuple[Callable[[], Step], str]:
    """Return what opens {artifact, parameters, abi, driver, workers}, and the runtime's version."""

    def load() -> Step:
        session = opened(request)

        def step(tokens: list[int], past: int) -> None:
            if len(tokens) == 1:
                session.decode(tokens[0], past)
            else:
                session.prefill(tokens, past)

        return step

    return load, host.runtime_version()


def answering(request: Request) -> scoring.Answer:
    """Return what gives the logits of a variant."""
    session = opened(request)

    def answer(tokens: list[int], past: int) -> NDArray[np.float32]:
        if past == 0:
            session.prefill(tokens, 0)
        else:
            session.decode(tokens[0], past)
        return session.logits()

    return answer


def score(request: Request) -> Request:
    """Score a variant on {reference} with a {prompt}."""
    return scoring.score(Path(request["reference"]), request["prompt"], answering(request))


def greedy(request: Request) -> Request:
    """Answer {prompts} with up to {count} tokens each, until one of {stops}."""
    return {"answers": scoring.greedy(request["prompts"], request["stops"], request["count"], answering(request))}


def along(request: Request) -> Request:
    """Score a variant along the answers of {reference}."""
    return scoring.along(Path(request["reference"]), answering(request))


def main() -> None:
    """Serve one variant."""
    runner = Runner(loader)
    serve({"open": runner.open, "round": runner.round, "score": score, "greedy": greedy, "along": along})


if __name__ == "__main__":
    main()
