"""The tables of a catalog. Other tools read the views of `migrations`, not the tables."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Double,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from llmbuild.system.strict_json import JsonObject

Digest = String(64)
Cells = dict[str, Any]
"""A row of any table: columns are accessed by name, without static types."""


class Base(DeclarativeBase):
    """Base of all tables; digests are 64 hex digits, times are UTC in ISO 8601."""

    type_annotation_map: ClassVar[dict[object, object]] = {JsonObject: JSON, float: Double}


class Info(Base):
    """One row: the version of the schema, which every reader checks first."""

    __tablename__ = "info"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    schema_version: Mapped[int]
    created_at: Mapped[str]


class TargetRow(Base):
    """A resolved target."""

    __tablename__ = "target"
    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    name: Mapped[str] = mapped_column(String(64), index=True)
    body: Mapped[JsonObject]


class MachineRow(Base):
    """A host with measurements; its digest is the fingerprint."""

    __tablename__ = "machine"
    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    name: Mapped[str]
    body: Mapped[JsonObject]


class LimitRow(Base):
    """The limits of a machine, measured once: bandwidth and arithmetic peaks."""

    __tablename__ = "machine_limit"
    machine: Mapped[str] = mapped_column(ForeignKey("machine.digest"), primary_key=True)
    body: Mapped[JsonObject]
    created_at: Mapped[str]


class ToolchainRow(Base):
    """The versions of a toolchain."""

    __tablename__ = "toolchain"
    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    body: Mapped[JsonObject]


class ProgramRow(Base):
    """Imported MLIR, parameters and check data, all blobs; `tokenizer` is a blob too, absent for a bare shape."""

    __tablename__ = "program"
    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    module: Mapped[str] = mapped_column(Digest)
    parameters: Mapped[str] = mapped_column(Digest)
    checks: Mapped[str] = mapped_column(Digest)
    parameter_bytes: Mapped[int] = mapped_column(BigInteger)
    abi: Mapped[JsonObject]


class ImportRow(Base):
    """The result of an import, by the digest of its inputs."""

    __tablename__ = "import"
    key: Mapped[str] = mapped_column(Digest, primary_key=True)
    inputs: Mapped[JsonObject]
    program: Mapped[str] = mapped_column(ForeignKey("program.digest"))
    seconds: Mapped[float]
    created_at: Mapped[str]


class ReferenceRow(Base):
    """The logits of the library's f32 model on the quality text, a blob, by the digest of the inputs."""

    __tablename__ = "reference"
    key: Mapped[str] = mapped_column(Digest, primary_key=True)
    blob: Mapped[str] = mapped_column(Digest)
    inputs: Mapped[JsonObject]
    created_at: Mapped[str]


class ArtifactRow(Base):
    """A `.vmfb` in the blob store."""

    __tablename__ = "artifact"
    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    runtime: Mapped[str]
    created_at: Mapped[str]


class CompileRow(Base):
    """The result of a compile, by program, target, flags and compiler."""

    __tablename__ = "compile"
    key: Mapped[str] = mapped_column(Digest, primary_key=True)
    inputs: Mapped[JsonObject]
    artifact: Mapped[str] = mapped_column(ForeignKey("artifact.digest"), index=True)
    seconds: Mapped[float]
    created_at: Mapped[str]


class FrontHalfRow(Base):
    """A partial compile, a packed blob, by its inputs; `features` are the scheduling features of a front half."""

    __tablename__ = "front_half"
    key: Mapped[str] = mapped_column(Digest, primary_key=True)
    inputs: Mapped[JsonObject]
    blob: Mapped[str] = mapped_column(Digest)
    features: Mapped[JsonObject]
    seconds: Mapped[float]
    created_at: Mapped[str]


class TuningRow(Base):
    """The configuration that was fastest for a kind of dispatch, by shape, types, target and compiler.

    `gain` is the seconds with the compiler's own configuration over those with this one; 1 where its own was best. A
    row whose inputs are `winners` names a set of such configurations by its digest.
    """

    __tablename__ = "dispatch_tuning"
    key: Mapped[str] = mapped_column(Digest, primary_key=True)
    inputs: Mapped[JsonObject]
    configuration: Mapped[str] = mapped_column(Text)
    gain: Mapped[float] = mapped_column(Float)
    tried: Mapped[list[JsonObject]] = mapped_column(JSON)
    created_at: Mapped[str]


class VariantRow(Base):
    """Program × target × point × toolchain. `program` and `artifact` are absent where they could not be made."""

    __tablename__ = "variant"
    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    program: Mapped[str | None] = mapped_column(ForeignKey("program.digest"))
    target: Mapped[str] = mapped_column(ForeignKey("target.digest"))
    toolchain: Mapped[str] = mapped_column(ForeignKey("toolchain.digest"))
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifact.digest"))
    tokenizer: Mapped[str | None] = mapped_column(Digest)
    chat: Mapped[str | None] = mapped_column(Digest)
    lineage: Mapped[str] = mapped_column(Digest, index=True)
    point: Mapped[JsonObject]
    is_default: Mapped[bool] = mapped_column(Boolean)
    created_at: Mapped[str]


class TrialRow(Base):
    """One evaluated point. `scope` is the digest of all inputs of an outcome except the point."""

    __tablename__ = "trial"
    scope: Mapped[str] = mapped_column(Digest, primary_key=True)
    point: Mapped[str] = mapped_column(Digest, primary_key=True)
    number: Mapped[int]
    variant: Mapped[str] = mapped_column(ForeignKey("variant.digest"), index=True)
    failure: Mapped[int | None] = mapped_column(ForeignKey("failure.id"))
    seconds: Mapped[float]
    created_at: Mapped[str]


class MeasurementRow(Base):
    """Medians as columns; 95 % intervals, ratios to the baseline and samples as JSON beside them."""

    __tablename__ = "measurement"
    key: Mapped[str] = mapped_column(Digest, primary_key=True)
    scope: Mapped[str] = mapped_column(Digest, index=True)
    variant: Mapped[str] = mapped_column(ForeignKey("variant.digest"), index=True)
    artifact: Mapped[str] = mapped_column(ForeignKey("artifact.digest"))
    machine: Mapped[str] = mapped_column(ForeignKey("machine.digest"))
    workload: Mapped[str] = mapped_column(String(64))
    workload_body: Mapped[JsonObject]
    protocol: Mapped[int]
    ttft_s: Mapped[float | None] = mapped_column(Float)
    tpot_s: Mapped[float | None] = mapped_column(Float)
    e2e_s: Mapped[float | None] = mapped_column(Float)
    output_tokens_per_s: Mapped[float | None] = mapped_column(Float)
    energy_j_per_token: Mapped[float | None] = mapped_column(Float)
    energy_source: Mapped[str | None]
    energy: Mapped[JsonObject | None] = mapped_column(JSON(none_as_null=True))
    itl_p99_s: Mapped[float | None] = mapped_column(Float)
    session: Mapped[str | None]
    peak_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    load_s: Mapped[float | None] = mapped_column(Float)
    quality_kl: Mapped[float | None] = mapped_column(Float)
    quality_top1: Mapped[float | None] = mapped_column(Float)
    quality_perplexity: Mapped[float | None] = mapped_column(Float)
    dispatches_per_token: Mapped[float | None] = mapped_column(Float)
    bandwidth_fraction: Mapped[float | None] = mapped_column(Float)
    peak_fraction: Mapped[float | None] = mapped_column(Float)
    operators: Mapped[list[JsonObject]] = mapped_column(JSON)
    intervals: Mapped[JsonObject]
    ratios: Mapped[JsonObject]
    samples: Mapped[JsonObject]
    notes: Mapped[JsonObject]
    created_at: Mapped[str]
    __table_args__ = (
        Index(
            "measurement_by_key",  # narrow, so that the readings of a pick are close together
            "key",
            "tpot_s",
            "ttft_s",
            "itl_p99_s",
            "e2e_s",
            "output_tokens_per_s",
            "energy_j_per_token",
            "peak_memory_bytes",
            "load_s",
            "quality_kl",
            "quality_top1",
        ),
    )


class LoadCurveRow(Base):
    """The time of a step of a server, by artifact, settings, machine and protocol; `body` is the whole curve.

    Seconds and joules are of one sequence that decodes in the middle of the context, of as many as were measured, and
    of the longest piece of a prompt; joules are absent without a meter.
    """

    __tablename__ = "load_curve"
    __table_args__ = (Index("load_curve_by_variant", "variant"),)
    key: Mapped[str] = mapped_column(Digest, primary_key=True)
    variant: Mapped[str] = mapped_column(ForeignKey("variant.digest"))
    artifact: Mapped[str] = mapped_column(ForeignKey("artifact.digest"))
    machine: Mapped[str] = mapped_column(ForeignKey("machine.digest"))
    driver: Mapped[str]
    workers: Mapped[int]
    context: Mapped[int]
    decodes_most: Mapped[int]
    prompt_most: Mapped[int]
    held_out: Mapped[int]
    decode_s: Mapped[float]
    decodes_s: Mapped[float]
    prompt_s: Mapped[float]
    turn_s: Mapped[float]
    row_s: Mapped[float]
    error_p95: Mapped[float]
    decode_j: Mapped[float | None]
    decodes_j: Mapped[float | None]
    prompt_j: Mapped[float | None]
    energy_source: Mapped[str | None]
    body: Mapped[JsonObject]
    protocol: Mapped[int]
    created_at: Mapped[str]


class FailureRow(Base):
    """A failed tool, with the command that reproduces the failure."""

    __tablename__ = "failure"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    model: Mapped[str]
    variant: Mapped[str | None] = mapped_column(Digest, index=True)
    stage: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text)
    command: Mapped[str] = mapped_column(Text)
    log: Mapped[str] = mapped_column(Text)
    lasting: Mapped[bool] = mapped_column(Boolean)
    created_at: Mapped[str]


class StandingRow(Base):
    """The standing of a variant among a recipe's variants on one target, machine and workload.

    `ranking` is the digest of its inputs, and `source` that of the weights and the tokenizer: all current standings
    are of one ranking, and a name stands for one source. Both are absent in older rows, and `ranking` in those that
    were ranked elsewhere. Recipes that differ in the tokenizer share variants, so the tokenizer is here too; a row
    without a source has its variant's tokenizer. `chat` is the model's chat template, a blob, and goes with the
    tokenizer; it decides no reading, so that all standings of a name and source have the one that was built last.
    """

    __tablename__ = "standing"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    model: Mapped[str] = mapped_column(String(64))
    target: Mapped[str] = mapped_column(ForeignKey("target.digest"))
    machine: Mapped[str] = mapped_column(ForeignKey("machine.digest"))
    workload: Mapped[str] = mapped_column(String(64))
    variant: Mapped[str] = mapped_column(ForeignKey("variant.digest"), index=True)
    measurement: Mapped[str | None] = mapped_column(ForeignKey("measurement.key"))
    failure: Mapped[int | None] = mapped_column(ForeignKey("failure.id"))
    status: Mapped[str] = mapped_column(String(16))
    confidence: Mapped[float | None] = mapped_column(Float)
    reason: Mapped[str] = mapped_column(Text)
    ranking: Mapped[str | None] = mapped_column(Digest)
    source: Mapped[str | None] = mapped_column(Digest)
    tokenizer: Mapped[str | None] = mapped_column(Digest)
    chat: Mapped[str | None] = mapped_column(Digest)
    __table_args__ = (
        UniqueConstraint("model", "target", "machine", "workload", "variant"),
        Index("standing_by_model", "model", "status"),
    )


class BuildRow(Base):
    """The progress of a recipe's build on a target and machine; `inputs` are the inputs of its key."""

    __tablename__ = "build"
    key: Mapped[str] = mapped_column(Digest, primary_key=True)
    model: Mapped[str] = mapped_column(String(64))
    scope: Mapped[str] = mapped_column(Digest)
    inputs: Mapped[JsonObject]
    seconds: Mapped[float]
    raced: Mapped[bool] = mapped_column(Boolean)
    ended: Mapped[str]
    created_at: Mapped[str]


class CollectedRow(Base):
    """A blob that `gc` removed: its inputs are still known, and nothing is stale without it."""

    __tablename__ = "collected"
    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[str]
