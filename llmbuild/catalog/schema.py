"""Open a catalog: create it, migrate an older one, refuse a newer one."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DatabaseError, OperationalError

from llmbuild.catalog.location import is_url
from llmbuild.catalog.place import FILE, PUBLISHED_FILE, URL_FILE
from llmbuild.errors import CatalogError
from llmbuild.runtime.reader import connected

SCHEMA_VERSION = 8
BUSY_SECONDS = 60
WRITER = 0x6C6C6D62
"""Number of the advisory lock that serializes the writers of a Postgres catalog."""
HEAD = "head"
MIGRATIONS = Path(__file__).parent / "migrations"


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def folder_of(location: str) -> Path:
    """Return the folder of a catalog; a database URL gets a local one, which holds its blobs and the URL.

    Raises:
        CatalogError: not a URL of Postgres, or the folder belongs to another catalog.
    """
    if not is_url(location):
        return Path(location)
    if not location.startswith("postgresql"):
        raise CatalogError(f"-C {location.split('://')[0]}://...: a catalog is a folder or postgresql://...")
    name = location.rsplit("/", 1)[-1].split("?")[0] or "postgres"
    folder = Path(os.environ.get("LLMBUILD_BLOBS", f"catalog-{name}"))
    if os.environ.get("LLMBUILD_BLOBS") == "":
        raise CatalogError("$LLMBUILD_BLOBS is empty: unset it, or name a folder")
    with database_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / URL_FILE
        if (known.is_file() and known.read_text().strip() != location) or (folder / FILE).is_file():
            raise CatalogError(f"{folder}: holds another catalog: name a folder for the blobs with $LLMBUILD_BLOBS")
        if not known.is_file():
            known.touch(mode=0o600)  # a URL may hold a password
            known.write_text(location + "\n")
    return folder


def open_engine(folder: Path) -> Engine:
    """Return an engine on the catalog in `folder`, created or migrated if necessary.

    Raises:
        CatalogError: not writable, not a catalog, corrupt, published, or of a newer schema.
    """
    with database_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / PUBLISHED_FILE).is_file():
            raise CatalogError(
                f"{folder}: a published catalog is only read: `llmbuild merge {folder} -C FOLDER` makes one to build in"
            )
        engine = _engine(folder)
        found = schema_version(engine)
        if found is not None and found > SCHEMA_VERSION:
            raise CatalogError(
                f"{folder / FILE}: the catalog's schema is {found}, this llmbuild knows {SCHEMA_VERSION}: "
                "upgrade llmbuild, or name another catalog with -C"
            )
        if found != SCHEMA_VERSION:
            _migrate(engine)
    return engine


@contextlib.contextmanager
def migrated_copy(folder: Path) -> Iterator[Path]:
    """Yield a folder with a copy of a catalog's rows, migrated to the newest schema; the catalog is unchanged.

    Raises:
        CatalogError: rows in a server, which are not copied; or an error of `open_engine`.
    """
    if (folder / URL_FILE).is_file():
        raise CatalogError(f"{folder}: is of an earlier schema: any build but a dry run brings it to the newest")
    if (folder / PUBLISHED_FILE).is_file():
        open_engine(folder)
    with TemporaryDirectory(prefix="llmbuild-") as name:
        copy = Path(name)
        with (
            database_errors(folder),
            closing(connected(folder / FILE)) as source,
            closing(sqlite3.connect(copy / FILE)) as target,
        ):
            source.backup(target)
        try:
            open_engine(copy).dispose()
        except CatalogError as error:
            raise CatalogError(str(error).replace(name, str(folder))) from None
        yield copy


def copied(source: Path, database: Path) -> None:
    """Copy a database without its free pages into a new, self-contained file without a write-ahead log.

    `VACUUM INTO` accepts only UTF-8 names.
    """
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(database)) as new:
        old.backup(new)
        new.execute("PRAGMA journal_mode=DELETE")
        new.execute("VACUUM")


def _engine(folder: Path) -> Engine:
    server = folder / URL_FILE
    if server.is_file():
        return create_engine(server.read_text().strip().replace("postgresql://", "postgresql+psycopg://", 1))
    file = URL.create("sqlite", database=str((folder / FILE).absolute()))  # in a URL, `?` would end the path
    engine = create_engine(file, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _configure)
    return engine


def begin_writing(connection: Connection) -> None:
    """Become the only writer: wait for the previous one, so that no transaction has to be retried."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER})")


def schema_version(engine: Engine) -> int | None:
    """Return a database's schema version; None for an empty one."""
    if not inspect(engine).has_table("info"):
        return None
    with engine.connect() as connection:
        version = connection.execute(text("SELECT schema_version FROM info")).scalar()
    return None if version is None else int(version)


def _configure(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")


def _commit(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("COMMIT")
    else:
        connection.commit()


def _migrate(engine: Engine) -> None:
    """Bring the database to the newest revision in one transaction; a killed migration leaves the old schema."""
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(MIGRATIONS), version_locations=[str(MIGRATIONS)])
    with engine.connect() as connection:
        begin_writing(connection)
        if schema_version(engine) != SCHEMA_VERSION:  # another process may have migrated it
            with EnvironmentContext(Config(), script, fn=lambda rev, _: script._upgrade_revs(HEAD, rev)) as context:
                context.configure(connection=connection, transactional_ddl=False)
                context.run_migrations()
            connection.execute(text("DELETE FROM info"))
            connection.execute(
                text("INSERT INTO info (id, schema_version, created_at) VALUES (1, :v, :t)"),
                {"v": SCHEMA_VERSION, "t": now()},
            )
        _commit(connection)


@contextlib.contextmanager
def database_errors(folder: Path) -> Iterator[None]:
    """Turn an error of a database or a file system into one message."""
    try:
        yield
    except OperationalError as error:
        raise CatalogError(f"{folder}: the catalog cannot be used: {error.orig}; {_advice(str(error.orig))}") from None
    except DatabaseError as error:
        raise CatalogError(f"{folder}: not a catalog, or a damaged one: {error.orig}; restore it from a copy") from None
    except sqlite3.Error as error:
        raise CatalogError(f"{folder}: not a catalog, or a damaged one: {error}; restore it from a copy") from None
    except (FileExistsError, NotADirectoryError):
        raise CatalogError(
            f"{folder}: the catalog cannot be used: a file is in the way: name a folder with -C"
        ) from None
    except PermissionError as error:
        raise CatalogError(f"{folder}: the catalog cannot be used: {error.strerror}; {_advice('readonly')}") from None
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
