"""Schema 3: in which rounds a measurement was taken, of what its joules are, and the 99th percentile between tokens."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

VARIANTS = """
CREATE VIEW variants AS
SELECT s.variant AS variant, s.model AS model, t.name AS target, m.name AS machine, s.workload AS workload,
       s.status AS status, v.is_default AS "default",
       r.ttft_s, r.tpot_s, r.itl_p99_s, r.e2e_s, r.output_tokens_per_s,
       r.energy_j_per_token, r.energy_source, r.energy AS energy,
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
       r.session AS session, r.ttft_s, r.tpot_s, r.itl_p99_s, r.e2e_s, r.output_tokens_per_s,
       r.energy_j_per_token, r.energy_source, r.energy AS energy,
       r.peak_memory_bytes, r.load_s, r.quality_kl, r.quality_top1, r.quality_perplexity,
       r.dispatches_per_token, r.bandwidth_fraction, r.peak_fraction, r.operators AS operators,
       r.intervals AS intervals, r.ratios AS ratios, r.samples AS samples, r.notes AS notes,
       r.created_at AS created_at
FROM measurement r JOIN machine m ON m.digest = r.machine
"""


def upgrade() -> None:
    """Add three columns, and make the views that show them anew."""
    for name in ("front", "variants", "measurements"):
        op.execute(f"DROP VIEW {name}")
    for column in (
        sa.Column("session", sa.String(), nullable=True),
        sa.Column("energy", sa.JSON(), nullable=True),
        sa.Column("itl_p99_s", sa.Float(), nullable=True),
    ):
        op.add_column("measurement", column)
    for text in (VARIANTS, FRONT, MEASUREMENTS):
        op.execute(text)
