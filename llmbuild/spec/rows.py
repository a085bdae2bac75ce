"""Rows of a catalog's view `variants`, as the reader returns them: checked, JSON columns parsed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypedDict, TypeVar

from llmbuild.spec.space import Value
from llmbuild.system.strict_json import JsonObject

T = TypeVar("T")
File = Literal["artifact", "parameters", "tokenizer", "chat"]
"""Columns with a blob that opening a variant reads."""


class Row(TypedDict, total=False):
    """One variant on a machine under a workload.

    The columns depend on the query: a verdict needs few, and catalogs of earlier schemas lack some.
    """

    variant: str
    model: str
    target: str
    machine: str
    workload: str
    status: str
    default: bool
    ttft_s: float | None
    tpot_s: float | None
    itl_p99_s: float | None
    e2e_s: float | None
    output_tokens_per_s: float | None
    energy_j_per_token: float | None
    energy_source: str | None
    energy: JsonObject | None
    peak_memory_bytes: int | None
    artifact_bytes: int | None
    parameter_bytes: int | None
    load_s: float | None
    quality_kl: float | None
    quality_top1: float | None
    quality_perplexity: float | None
    dispatches_per_token: float | None
    bandwidth_fraction: float | None
    peak_fraction: float | None
    operators: list[JsonObject] | None
    point: dict[str, Value]
    choices: str | dict[str, Value]
    """The point as stored, in a row that was read for a verdict."""
    artifact: str | None
    toolchain: str
    confidence: float | None
    reason: str | None
    machine_digest: str
    machine_stored: str
    """The digest that the machine is stored under, if an earlier version named it differently."""
    target_digest: str
    target_body: JsonObject
    program: str | None
    parameters: str | None
    abi: JsonObject | None
    tokenizer: str | None
    chat: str | None
    runtime: str | None
    ratios: dict[str, list[float]] | None
    intervals: dict[str, list[float]] | None
    notes: dict[str, str] | None
    workload_body: JsonObject
    """A column of a measurement, which is read like a row."""


def reading(row: Mapping[str, object], metric: str) -> float | None:
    """Return the number in a column given by name; None where there is none."""
    value = row.get(metric)
    return value if isinstance(value, (int, float)) else None


def number(row: Mapping[str, object], metric: str) -> float:
    """Return the number in a column of a row that has one."""
    return present(reading(row, metric))


def present(cell: T | None) -> T:
    """Return a cell that is not empty, after a check."""
    assert cell is not None
    return cell


def cells(row: Mapping[str, object], names: Iterable[str]) -> dict[str, object]:
    """Return the columns of these names."""
    return {name: row[name] for name in names}
