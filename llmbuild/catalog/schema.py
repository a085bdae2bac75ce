"""Open a catalog: create it, migrate an older one, refuse a newer one."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DatabaseError, OperationalError

from llmbuild.errors import CatalogError

SCHEMA_VERSION = 3
FILE = "catalog.sqlite"
BUSY_SECONDS = 60
MIGRATIONS = Path(__file__).parent / "migrations"


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def is_url(location: str) -> bool:
    """Say whether a catalog is named by a database URL instead of a folder."""
    return "://" in location


def open_engine(folder: Path) -> Engine:
    """Return an engine on the catalog in `folder`, made or migrated if need be.

    Raises:
        CatalogError: not writable, not a catalog, corrupt, or of a newer schema.
    """
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        engine = create_engine(f"sqlite:///{folder / FILE}", connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _configure)
        found = schema_version(engine)
        if found is not None and found > SCHEMA_VERSION:
            raise CatalogError(
                f"{folder / FILE}: the catalog's schema is {found}, this llmbuild knows {SCHEMA_VERSION}: "
                "upgrade llmbuild, or name another catalog with -C"
            )
        if found != SCHEMA_VERSION:
            _migrate(engine)
    return engine


def schema_version(engine: Engine) -> int | None:
    """Return the version a database says it has; None for an empty one."""
    if not inspect(engine).has_table("info"):
        return None
    with engine.connect() as connection:
        version = connection.execute(text("SELECT schema_version FROM info")).scalar()
    return None if version is None else int(version)


def _configure(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")


def _migrate(engine: Engine) -> None:
    """Bring the database to the newest revision in one transaction; a killed migration leaves the old schema."""
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("version_locations", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        if schema_version(engine) != SCHEMA_VERSION:  # another process may have been first
            with EnvironmentContext(config, script, fn=lambda rev, _: script._upgrade_revs("head", rev)) as context:
                context.configure(connection=connection, transactional_ddl=False)
                context.run_migrations()
            connection.execute(text("DELETE FROM info"))
            connection.execute(
                text("INSERT INTO info (id, schema_version, created_at) VALUES (1, :v, :t)"),
                {"v": SCHEMA_VERSION, "t": now()},
            )
        connection.exec_driver_sql("COMMIT")


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """Turn what a database or a file system says into one message."""
    try:
        yield
    except OperationalError as error:
        raise CatalogError(f"{folder}: the catalog cannot be used: {error.orig}; {_advice(str(error.orig))}") from None
    except DatabaseError as error:
        raise CatalogError(f"{folder}: not a catalog, or a damaged one: {error.orig}; restore it from a copy") from None
    except OSError as error:
        raise CatalogError(f"{folder}: the catalog cannot be used: {error.strerror or error}") from None


def _advice(reason: str) -> str:
    if "full" in reason:
        return "free some space and run the same command again: what was finished is kept"
    if "readonly" in reason or "read-only" in reason or "unable to open" in reason:
        return "it cannot be written: name another one with -C, or change its permissions"
    if "locked" in reason:
        return f"another process has held it for more than {BUSY_SECONDS} s"
    return "run llmbuild doctor"
