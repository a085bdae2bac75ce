"""Requests of the commands that read, run and pull; `build/request.py` has the request of a build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Selection:
    """The selection of a variant: bounds such as `tpot_s<=0.02`, the objective, and the rows."""

    slo: tuple[str, ...] = ()
    objective: str | None = None
    target: str | None = None
    workload: str | None = None


@dataclass(frozen=True)
class Trust:
    """The trusted publications: public keys or folders of them, and whether unsigned ones are allowed."""

    keys: tuple[str, ...] = ()
    allow_unsigned: bool = False


@dataclass(frozen=True)
class QueryRequest:
    """Rows of a catalog; with `everything` also those that are on no front."""

    catalog: Path
    model: str | None = None
    selection: Selection = Selection()
    everything: bool = False


@dataclass(frozen=True)
class PickRequest:
    """One variant for this host, or for a host with another CPU."""

    catalog: Path
    model: str | None = None
    selection: Selection = Selection()
    cpu: str | None = None
    lock: Path | None = None
    trust: Trust = Trust()


@dataclass(frozen=True)
class LoadRequest:
    """The variant that holds bounds on requests at a rate, such as `5/s`, or at the highest that there is.

    `lengths` are medians of the tokens of prompts and answers, such as `128:64`.
    """

    catalog: Path
    model: str | None
    selection: Selection
    rate: str | None
    lengths: str
    sequences: int | None = None
    scheduler: str | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class RunRequest:
    """The variant to open: by a lock, by a digest, or else by a pick."""

    catalog: Path
    model: str
    selection: Selection = Selection()
    variant: str | None = None
    lock: Path | None = None
    fallback: bool = False
    trust: Trust = Trust()


@dataclass(frozen=True)
class Sampling:
    """The sampling of an answer, and its end."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...]
    add_special_tokens: bool


@dataclass(frozen=True)
class StudyRequest:
    """The searches of a model, of one target if it is named, and the Optuna storage that they are added to."""

    catalog: Path
    model: str
    storage: str
    target: str | None = None
    objectives: tuple[str, ...] = ()


@dataclass(frozen=True)
class PullRequest:
    """What to fetch of a publication: the picks on this host, of these models, or everything."""

    source: str
    catalog: Path
    models: tuple[str, ...] = ()
    selection: Selection = Selection()
    everything: bool = False
    trust: Trust = Trust()
