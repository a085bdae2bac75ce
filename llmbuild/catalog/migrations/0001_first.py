"""Schema 1: the tables of the main path and the four views."""

from __future__ import annotations

from alembic import op

from llmbuild.catalog import views
from llmbuild.catalog.tables import Base

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create everything."""
    Base.metadata.create_all(op.get_bind())
    for text in views.ALL.values():
        op.execute(text)
