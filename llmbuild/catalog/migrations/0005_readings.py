"""Schema 5: the readings that variants are picked by lie side by side."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"

COLUMNS = (
    "key tpot_s ttft_s itl_p99_s e2e_s output_tokens_per_s energy_j_per_token peak_memory_bytes load_s quality_kl "
    "quality_top1"
).split()


def upgrade() -> None:
    """Add an index that holds them."""
    op.create_index("measurement_by_key", "measurement", COLUMNS)
