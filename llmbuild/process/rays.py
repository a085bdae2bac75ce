"""The library Ray, an extra: found, connected to a cluster, and the one place where it is imported."""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec
from typing import Any

from llmbuild.errors import InputError

ANY = "ray"
"""The cluster that the environment variable RAY_ADDRESS names, else the one that this machine is a node of."""
VARIABLE = "RAY_ADDRESS"
_TOLD = 300


def at_node(node: str) -> Any:
    """Return the strategy that places work on a node, by Ray's number of it, and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def this_node() -> str:
    """Return Ray's number of the node where this runs, within a task or an actor."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def told_of(error: BaseException) -> str:
    """Return an error of Ray in one line: its first ones name classes and numbers, the cause comes last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[-_TOLD:] if lines else type(error).__name__


def is_ray(text: str) -> bool:
    """Return whether a text names a cluster of Ray: `ray`, or `ray://HOST:PORT`."""
    return text == ANY or text.startswith(f"{ANY}://")


def connected(text: str, namespace: str) -> Any:
    """Return Ray's module, connected to the cluster that a text names.

    Names of actors hold within a namespace.

    Raises:
        InputError: Ray is not installed, or no cluster answers.
    """
    if find_spec("ray") is None:
        raise InputError("Ray is not installed: pip install 'llmbuild[ray]'")
    import ray

    if ray.is_initialized():  # by an earlier fleet or build of this process
        ray.shutdown()
    address = os.environ.get(VARIABLE, "auto") if text == ANY else text
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        why = " ".join(str(error).split())[:_TOLD]
        told = f"`ray start --head` starts a cluster, ${VARIABLE} or ray://HOST:PORT names one that runs"
        raise InputError(f"no cluster of Ray at {address}: {told} ({why})") from None
    _tell_on_stderr(ray)
    return ray


def _tell_on_stderr(ray: Any) -> None:
    """Let what Ray has to tell of its nodes be a line on standard error: it writes pages to standard output."""
    with contextlib.suppress(AttributeError):  # its inner parts may have other names in another version
        worker = ray._private.worker
        tell = worker.print_to_stdstream

        def shorter(data: dict[str, Any], *more: Any, **named: Any) -> None:
            lines = [line.partition("\n")[0][:_TOLD] for line in data["lines"]]
            tell({**data, "lines": lines, "is_err": True}, *more, **named)

        worker.print_to_stdstream = shorter
