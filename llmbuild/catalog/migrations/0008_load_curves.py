"""Schema 8: load curves, the time of a step of a server by what is in it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

LOAD_CURVES = """
CREATE VIEW load_curves AS
SELECT c.key AS load_curve, c.variant AS variant,
       (SELECT min(s.model) FROM standing s WHERE s.variant = c.variant) AS model,
       t.name AS target, m.name AS machine, c.machine AS machine_digest, c.artifact AS artifact,
       c.driver, c.workers, c.context, c.decodes_most, c.prompt_most,
       c.decode_s, c.decodes_s, c.prompt_s, c.decode_j, c.decodes_j, c.prompt_j, c.energy_source,
       c.error_p95, c.held_out, c.turn_s, c.row_s, c.body AS body, c.protocol, c.created_at
FROM load_curve c
JOIN machine m ON m.digest = c.machine
JOIN variant v ON v.digest = c.variant
JOIN target t ON t.digest = v.target
"""


def upgrade() -> None:
    """Add the table and its view."""
    digest, seconds = sa.String(length=64), ("decode_s", "decodes_s", "prompt_s", "turn_s", "row_s", "error_p95")
    joules = ("decode_j", "decodes_j", "prompt_j")
    op.create_table(
        "load_curve",
        sa.Column("key", digest, nullable=False),
        sa.Column("variant", digest, sa.ForeignKey("variant.digest"), nullable=False),
        sa.Column("artifact", digest, sa.ForeignKey("artifact.digest"), nullable=False),
        sa.Column("machine", digest, sa.ForeignKey("machine.digest"), nullable=False),
        sa.Column("driver", sa.String(), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("workers", "context")),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("decodes_most", "prompt_most", "held_out")),
        *(sa.Column(name, sa.Double(), nullable=False) for name in seconds),
        *(sa.Column(name, sa.Double(), nullable=True) for name in joules),
        sa.Column("energy_source", sa.String(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("protocol", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index("load_curve_by_variant", "load_curve", ["variant"])
    op.execute(LOAD_CURVES)
