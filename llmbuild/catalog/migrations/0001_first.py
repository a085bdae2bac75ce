"""Schema 1: the tables of the main path and the four views, in SQL that SQLite and Postgres both take."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

VARIANTS = """
CREATE VIEW variants AS
SELECT s.variant AS variant, s.model AS model, t.name AS target, m.name AS machine, s.workload AS workload,
       s.status AS status, v.is_default AS "default",
       r.ttft_s, r.tpot_s, r.e2e_s, r.output_tokens_per_s, r.energy_j_per_token, r.energy_source,
       r.peak_memory_bytes, a.size_bytes AS artifact_bytes, p.parameter_bytes AS parameter_bytes, r.load_s,
       r.quality_kl, r.quality_top1, r.quality_perplexity,
       r.dispatches_per_token, r.bandwidth_fraction, r.peak_fraction, r.operators AS operators,
       v.point AS point, v.artifact AS artifact, v.toolchain AS toolchain,
       s.confidence AS confidence, s.reason AS reason,
       s.machine AS machine_digest, s.target AS target_digest, t.body AS target_body,
       p.digest AS program, p.parameters AS parameters, p.abi AS abi, v.tokenizer AS tokenizer,
       a.runtime AS runtime, r.ratios AS ratios, r.intervals AS intervals, r.notes AS notes
FROM standing s
JOIN variant v ON v.digest = s.variant
JOIN target t ON t.digest = s.target
JOIN machine m ON m.digest = s.machine
LEFT JOIN measurement r ON r.key = s.measurement
LEFT JOIN artifact a ON a.digest = v.artifact
LEFT JOIN program p ON p.digest = v.program
"""

FRONT = """
CREATE VIEW front AS SELECT * FROM variants WHERE status IN ('pareto', 'undecided')
"""

MEASUREMENTS = """
CREATE VIEW measurements AS
SELECT r.key AS measurement, r.variant AS variant, r.artifact AS artifact, m.name AS machine,
       r.machine AS machine_digest, r.workload AS workload, r.workload_body AS workload_body, r.protocol AS protocol,
       r.ttft_s, r.tpot_s, r.e2e_s, r.output_tokens_per_s, r.energy_j_per_token, r.energy_source,
       r.peak_memory_bytes, r.load_s, r.quality_kl, r.quality_top1, r.quality_perplexity,
       r.dispatches_per_token, r.bandwidth_fraction, r.peak_fraction, r.operators AS operators,
       r.intervals AS intervals, r.ratios AS ratios, r.samples AS samples, r.notes AS notes,
       r.created_at AS created_at
FROM measurement r JOIN machine m ON m.digest = r.machine
"""

FAILURES = """
CREATE VIEW failures AS
SELECT f.id AS failure, f.model AS model, f.variant AS variant, f.stage AS stage, f.reason AS reason,
       f.command AS command, f.log AS log, f.lasting AS lasting, f.created_at AS created_at, v.point AS point
FROM failure f LEFT JOIN variant v ON v.digest = f.variant
"""

VIEWS = (VARIANTS, FRONT, MEASUREMENTS, FAILURES)


def upgrade() -> None:
    """Create everything."""
    _tables()
    for text in VIEWS:
        op.execute(text)


def _tables() -> None:
    op.create_table(
        "artifact",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("runtime", sa.String(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "build",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.String(length=64), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("raced", sa.Boolean(), nullable=False),
        sa.Column("ended", sa.String(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "failure",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("variant", sa.String(length=64), nullable=True),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("log", sa.Text(), nullable=False),
        sa.Column("lasting", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_failure_variant"), "failure", ["variant"], unique=False)
    op.create_table(
        "info",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("schema_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "machine",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "program",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("module", sa.String(length=64), nullable=False),
        sa.Column("parameters", sa.String(length=64), nullable=False),
        sa.Column("checks", sa.String(length=64), nullable=False),
        sa.Column("parameter_bytes", sa.BigInteger(), nullable=False),
        sa.Column("abi", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "reference",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("blob", sa.String(length=64), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "target",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index(op.f("ix_target_name"), "target", ["name"], unique=False)
    op.create_table(
        "toolchain",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "compile",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("artifact", sa.String(length=64), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact"],
            ["artifact.digest"],
        ),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index(op.f("ix_compile_artifact"), "compile", ["artifact"], unique=False)
    op.create_table(
        "import",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("program", sa.String(length=64), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["program"],
            ["program.digest"],
        ),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "variant",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("program", sa.String(length=64), nullable=True),
        sa.Column("target", sa.String(length=64), nullable=False),
        sa.Column("toolchain", sa.String(length=64), nullable=False),
        sa.Column("artifact", sa.String(length=64), nullable=True),
        sa.Column("tokenizer", sa.String(length=64), nullable=True),
        sa.Column("lineage", sa.String(length=64), nullable=False),
        sa.Column("point", sa.JSON(), nullable=False),
        sa.Column("is_default", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact"],
            ["artifact.digest"],
        ),
        sa.ForeignKeyConstraint(
            ["program"],
            ["program.digest"],
        ),
        sa.ForeignKeyConstraint(
            ["target"],
            ["target.digest"],
        ),
        sa.ForeignKeyConstraint(
            ["toolchain"],
            ["toolchain.digest"],
        ),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index(op.f("ix_variant_lineage"), "variant", ["lineage"], unique=False)
    op.create_table(
        "machine_limit",
        sa.Column("machine", sa.String(length=64), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["machine"], ["machine.digest"]),
        sa.PrimaryKeyConstraint("machine"),
    )
    op.create_table(
        "measurement",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.String(length=64), nullable=False),
        sa.Column("variant", sa.String(length=64), nullable=False),
        sa.Column("artifact", sa.String(length=64), nullable=False),
        sa.Column("machine", sa.String(length=64), nullable=False),
        sa.Column("workload", sa.String(length=64), nullable=False),
        sa.Column("workload_body", sa.JSON(), nullable=False),
        sa.Column("protocol", sa.Integer(), nullable=False),
        sa.Column("ttft_s", sa.Float(), nullable=True),
        sa.Column("tpot_s", sa.Float(), nullable=True),
        sa.Column("e2e_s", sa.Float(), nullable=True),
        sa.Column("output_tokens_per_s", sa.Float(), nullable=True),
        sa.Column("energy_j_per_token", sa.Float(), nullable=True),
        sa.Column("energy_source", sa.String(), nullable=True),
        sa.Column("peak_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("load_s", sa.Float(), nullable=True),
        sa.Column("quality_kl", sa.Float(), nullable=True),
        sa.Column("quality_top1", sa.Float(), nullable=True),
        sa.Column("quality_perplexity", sa.Float(), nullable=True),
        sa.Column("dispatches_per_token", sa.Float(), nullable=True),
        sa.Column("bandwidth_fraction", sa.Float(), nullable=True),
        sa.Column("peak_fraction", sa.Float(), nullable=True),
        sa.Column("operators", sa.JSON(), nullable=False),
        sa.Column("intervals", sa.JSON(), nullable=False),
        sa.Column("ratios", sa.JSON(), nullable=False),
        sa.Column("samples", sa.JSON(), nullable=False),
        sa.Column("notes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact"],
            ["artifact.digest"],
        ),
        sa.ForeignKeyConstraint(
            ["machine"],
            ["machine.digest"],
        ),
        sa.ForeignKeyConstraint(
            ["variant"],
            ["variant.digest"],
        ),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index(op.f("ix_measurement_scope"), "measurement", ["scope"], unique=False)
    op.create_index(op.f("ix_measurement_variant"), "measurement", ["variant"], unique=False)
    op.create_table(
        "trial",
        sa.Column("scope", sa.String(length=64), nullable=False),
        sa.Column("point", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("variant", sa.String(length=64), nullable=False),
        sa.Column("failure", sa.Integer(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["failure"],
            ["failure.id"],
        ),
        sa.ForeignKeyConstraint(
            ["variant"],
            ["variant.digest"],
        ),
        sa.PrimaryKeyConstraint("scope", "point"),
    )
    op.create_index(op.f("ix_trial_variant"), "trial", ["variant"], unique=False)
    op.create_table(
        "standing",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=64), nullable=False),
        sa.Column("machine", sa.String(length=64), nullable=False),
        sa.Column("workload", sa.String(length=64), nullable=False),
        sa.Column("variant", sa.String(length=64), nullable=False),
        sa.Column("measurement", sa.String(length=64), nullable=True),
        sa.Column("failure", sa.Integer(), nullable=True),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("confidence", sa.Float(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["failure"],
            ["failure.id"],
        ),
        sa.ForeignKeyConstraint(
            ["machine"],
            ["machine.digest"],
        ),
        sa.ForeignKeyConstraint(
            ["measurement"],
            ["measurement.key"],
        ),
        sa.ForeignKeyConstraint(
            ["target"],
            ["target.digest"],
        ),
        sa.ForeignKeyConstraint(
            ["variant"],
            ["variant.digest"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("model", "target", "machine", "workload", "variant"),
    )
    op.create_index(op.f("ix_standing_variant"), "standing", ["variant"], unique=False)
    op.create_index("standing_by_model", "standing", ["model", "status"], unique=False)
