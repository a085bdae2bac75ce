"""Write tests/databases/schema-N.sql: a small catalog of schema N, which every later llmbuild must open.

python scripts/keep_database.py N

Run it once, when migration N is written. Schema 1 starts from the rows of a synthetic catalog; every later one from
the kept database before it, migrated.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "tests" / "databases"


def upgraded(folder: Path, version: int) -> None:
    """Bring the catalog in `folder` to the schema of one migration, not to the newest."""
    from llmbuild.catalog import schema

    schema.SCHEMA_VERSION = version
    schema.HEAD = f"{version:04d}"
    schema.open_engine(folder).dispose()


def main() -> None:
    """Write the file, unless it is there: a kept database never changes."""
    from llmbuild.catalog.schema import FILE, MIGRATIONS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", type=int, metavar="N", help="the schema to keep")
    version = parser.parse_args().version
    out = KEPT / f"schema-{version}.sql"
    if out.exists():
        sys.exit(f"{out} is kept already")
    known = sorted(int(p.name[:4]) for p in MIGRATIONS.glob("[0-9]*.py"))
    if version not in known[1:]:
        parser.error(f"there is no migration {version} to keep a database of; there are {known[1]} to {known[-1]}")
    with TemporaryDirectory() as name:
        folder = Path(name)
        earlier = [v for v in known if v < version]
        connection = sqlite3.connect(folder / FILE)
        connection.executescript((KEPT / f"schema-{earlier[-1]}.sql").read_text())
        connection.close()
        upgraded(folder, version)
        connection = sqlite3.connect(folder / FILE)
        out.write_text("\n".join(connection.iterdump()) + "\n")
        connection.close()
    print(out)


if __name__ == "__main__":
    main()
