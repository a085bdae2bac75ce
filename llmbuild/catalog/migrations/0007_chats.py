"""Schema 7: the chat template of a model goes with its tokenizer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

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
       p.digest AS program, p.parameters AS parameters, p.abi AS abi,
       CASE WHEN s.source IS NULL THEN v.tokenizer ELSE s.tokenizer END AS tokenizer,
       a.runtime AS runtime, r.ratios AS ratios, r.intervals AS intervals, r.notes AS notes,
       CASE WHEN s.source IS NULL THEN v.chat ELSE s.chat END AS chat
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


def upgrade() -> None:
    """Add the column beside each tokenizer, and show it in the views."""
    for name in ("front", "variants"):
        op.execute(f"DROP VIEW {name}")
    for table in ("variant", "standing"):
        op.add_column(table, sa.Column("chat", sa.String(length=64), nullable=True))
    for text in (VARIANTS, FRONT):
        op.execute(text)
