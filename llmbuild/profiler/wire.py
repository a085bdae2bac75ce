"""A measurement job as JSON, files by digest: the same job runs here, over ssh, or from a packed folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmbuild.digest import plain
from llmbuild.profiler.protocol import Prepared, Protocol, Quality, Subject
from llmbuild.spec.machine import Machine, machine_from
from llmbuild.spec.measurement import Measurement, Operator, Reading
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload
from llmbuild.system.strict_json import JsonObject

Where = Callable[[str], Path]
"""Returns the path of a blob by its digest."""

FILES = ("artifact_path", "parameters_path", "check_path")


def subject_body(subject: Subject) -> JsonObject:
    """Return a subject with the digests of its files as their names, in place of paths."""
    return {name: value.name if isinstance(value, Path) else plain(value) for name, value in vars(subject).items()}


def subject_of(body: JsonObject, where: Where) -> Subject:
    """Return a subject with the files at the paths that `where` returns."""
    listed = {name: tuple(value) for name, value in body.items() if isinstance(value, list)}
    known = {"known": _prepared(body["known"])} if body.get("known") else {}
    return Subject(**{**body, **listed, **known, **{name: where(body[name]) for name in FILES}})


def _prepared(body: JsonObject) -> Prepared:
    return Prepared(
        readings=_readings(body["readings"]),
        notes=body["notes"],
        operators=tuple(Operator(**one) for one in body["operators"]),
        timed={name: _readings(found) for name, found in body["timed"].items()},
    )


def files_of(subject: Subject) -> dict[str, Path]:
    """Return the files of a subject by digest."""
    return {path.name: path for path in (getattr(subject, name) for name in FILES)}


def bench_body(
    workloads: tuple[Workload, ...], quality: Quality, protocol: Protocol, target: Target, runtime: str, limits: object
) -> JsonObject:
    """Return the description of a bench; the machine is the one that it runs on.

    `runtime` is the version that made the artifacts, `limits` the machine's roofline or None.
    """
    return {
        "workloads": plain(workloads),
        "quality": {"data": quality.data.name if quality.data else None, "reason": quality.reason},
        "protocol": plain(protocol),
        "target": {"backend": target.backend, "arch": target.arch, "requires": list(target.requires)},
        "runtime": runtime,
        "limits": plain(limits) if limits is not None else None,
    }


def workloads_of(body: JsonObject) -> tuple[Workload, ...]:
    """Return the workloads of a bench."""
    return tuple(Workload(**w) for w in body["workloads"])


def quality_of(body: JsonObject, where: Where) -> Quality:
    """Return a bench's reference on held-out text."""
    told = body["quality"]
    return Quality(where(told["data"]) if told["data"] else None, told["reason"])


def measurement_of(body: JsonObject) -> Measurement:
    """Return a measurement from its JSON form."""
    made: JsonObject = {
        **body,
        "workload": Workload(**body["workload"]),
        "operators": tuple(Operator(**one) for one in body["operators"]),
        **{name: _readings(body[name]) for name in ("readings", "ratios")},
    }
    return Measurement(**made)


def _readings(body: JsonObject) -> dict[str, Reading]:
    return {name: _reading(found) for name, found in body.items()}


def _reading(body: JsonObject) -> Reading:
    return Reading(body["median"], body["low"], body["high"], tuple(body["samples"]))


def machine_of(body: JsonObject) -> Machine:
    """Return a machine from its JSON form."""
    return machine_from(body)


def failure_of(body: JsonObject) -> Failure:
    """Return a failure from its JSON form."""
    return Failure(**body)
