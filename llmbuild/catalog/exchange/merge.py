"""Merge the rows and blobs of one catalog into another.

Rows are named by content, so most are equal or new. Where both have a measurement, the later one is kept; where one
compile key has different bytes, those of the destination are kept and the conflict is reported; where both ranked the
same fronts, the ranks are invalid until the next build ranks them all. A name of another model in the destination is
reported, and its front is not merged; a name with another chat template is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sqlalchemy import Table, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from llmbuild.catalog import tables as t
from llmbuild.catalog.references import collected, references
from llmbuild.catalog.tables import Cells
from llmbuild.catalog.writer import Catalog
from llmbuild.digest import short
from llmbuild.spec.machine import NOWHERE
from llmbuild.spec.trial import FRONT

APART = ("info", "failure", "standing", "collected", "measurement", "load_curve")
"""Tables with a special rule; of all others, unknown rows are added."""

UNRANKED = "from another catalog: the next build ranks it with the others"


@dataclass
class Merged:
    """Numbers of added rows and bytes, and the conflicts of the two catalogs."""

    rows: dict[str, int] = field(default_factory=dict)
    blobs: int = 0
    blob_bytes: int = 0
    conflicts: list[str] = field(default_factory=list)


def merge(source: Catalog, into: Catalog) -> Merged:
    """Add the contents of `source` to `into`: blobs first, then every row in one transaction.

    A blob that does not match its digest is left out and reported.
    """
    done = Merged()
    with source.session() as session:
        named = {r.digest for r in references(session, source.blobs)}
        tables = {table.name: list(_rows(session, table)) for table in t.Base.metadata.sorted_tables}
    _blobs(source, into, named, done)
    with into.session(write=True) as session:
        done.conflicts += _irreproducible(session, tables["compile"])
        failures: dict[int, int] = {}
        for table in t.Base.metadata.sorted_tables:
            rows = tables[table.name]
            if table.name == "failure":
                failures = _failures(session, rows, done)
            elif table.name in ("measurement", "load_curve"):
                _measurements(session, table, rows, done)
            elif table.name not in APART:
                _add(session, table, [_renumbered(r, failures) for r in rows], done)
        _standings(session, tables["standing"], done)
        _collected(session, into, tables["collected"])
    return done


def _rows(session: Session, table: Table) -> Iterator[Cells]:
    for row in session.execute(select(table)):
        yield dict(row._mapping)


def _blobs(source: Catalog, into: Catalog, named: set[str], done: Merged) -> None:
    for name in sorted(named):
        if into.blobs.intact(name) or not source.blobs.has(name):
            continue
        if not source.blobs.verify(name):
            done.conflicts.append(f"blob {short(name)}: its bytes are not those of its name: left behind")
            continue
        path = source.blobs.path(name)
        into.blobs.put_file(path)
        done.blobs += 1
        done.blob_bytes += path.stat().st_size


def _add(session: Session, table: Table, rows: list[Cells], done: Merged) -> None:
    if rows:
        before = session.scalar(select(func.count()).select_from(table)) or 0
        session.execute(upsert(table).on_conflict_do_nothing(), rows)
        _count(done, table.name, (session.scalar(select(func.count()).select_from(table)) or 0) - before)


def _count(done: Merged, name: str, rows: int) -> None:
    if rows:
        done.rows[name] = done.rows.get(name, 0) + rows


def _renumbered(row: Cells, failures: dict[int, int]) -> Cells:
    return {**row, "failure": failures.get(row["failure"])} if "failure" in row else row


def _failures(session: Session, rows: list[Cells], done: Merged) -> dict[int, int]:
    """Add unknown failures, and return the id of each in the destination."""
    numbers = {}
    for row in rows:
        same = ("model", "variant", "stage", "command", "created_at")
        where = [getattr(t.FailureRow, name).is_not_distinct_from(row[name]) for name in same]
        known = session.scalar(select(t.FailureRow.id).where(*where))
        if known is None:
            added = t.FailureRow(**{k: v for k, v in row.items() if k != "id"})
            session.add(added)
            session.flush()
            known = added.id
            _count(done, "failure", 1)
        numbers[row["id"]] = known
    return numbers


def _measurements(session: Session, table: Table, rows: list[Cells], done: Merged) -> None:
    """Add what was measured; of two of the same key, the later one is kept."""
    known = {row[0]: row[1] for row in session.execute(select(table.c.key, table.c.created_at))}
    fresh = [row for row in rows if row["key"] not in known or known[row["key"]] < row["created_at"]]
    for row in fresh:
        session.execute(upsert(table).values(row).on_conflict_do_update(index_elements=["key"], set_=row))
    _count(done, table.name, len(fresh))


def _standings(session: Session, rows: list[Cells], done: Merged) -> None:
    """Add standings; those that both sides ranked separately are undecided and marked for a new ranking."""
    table = t.StandingRow.__table__
    names = ("model", "target", "machine", "workload")
    rows = _of_our_models(session, rows, done)
    done.conflicts += _other_chats(session, rows)
    ours = {tuple(row) for row in session.execute(select(*(table.c[n] for n in names)).distinct())}
    known = {tuple(row) for row in session.execute(select(*(table.c[n] for n in (*names, "variant"))))}
    mixed = set()
    for row in rows:
        group = tuple(row[n] for n in names)
        if (*group, row["variant"]) in known:
            continue
        values = {k: v for k, v in row.items() if k not in ("id", "failure")}
        if group in ours and row["machine"] != NOWHERE:
            mixed.add(row["model"])
            if row["status"] in FRONT:
                values |= {"status": "undecided", "confidence": None, "reason": UNRANKED}
        session.execute(upsert(t.StandingRow).values(values))
        _count(done, "standing", 1)
    if mixed:
        session.execute(update(t.BuildRow).where(t.BuildRow.model.in_(mixed)).values(raced=False))
        done.conflicts.append(f"{', '.join(sorted(mixed))}: ranked apart: `llmbuild build` ranks them together")


def _of_our_models(session: Session, rows: list[Cells], done: Merged) -> list[Cells]:
    """Return the standings whose name stands for the same model in both catalogs, and report the other names."""
    known = select(t.StandingRow.model, t.StandingRow.source).where(t.StandingRow.source.is_not(None)).distinct()
    ours = {row[0]: row[1] for row in session.execute(known)}
    other = {r["model"] for r in rows if r["source"] and ours.get(r["model"], r["source"]) != r["source"]}
    done.conflicts += [
        f"{name}: is another model there, with other weights or another tokenizer: its front is left behind; give one "
        f"of the two recipes another `name:`, or merge with `-C` into another catalog"
        for name in sorted(other)
    ]
    return [row for row in rows if row["model"] not in other]


def _other_chats(session: Session, rows: list[Cells]) -> list[str]:
    """Report the names with another chat template in the other catalog; every row keeps its own."""
    known = select(t.StandingRow.model, t.StandingRow.chat).where(t.StandingRow.chat.is_not(None)).distinct()
    ours = {row[0]: row[1] for row in session.execute(known)}
    other = {r["model"] for r in rows if r["chat"] and ours.get(r["model"], r["chat"]) != r["chat"]}
    return [
        f"{name}: has another chat template there, which its rows keep: `llmbuild build` gives all rows the present one"
        for name in sorted(other)
    ]


def _collected(session: Session, into: Catalog, rows: list[Cells]) -> None:
    known = collected(session)
    gone = [r for r in rows if r["digest"] not in known and not into.blobs.has(r["digest"])]
    if gone:
        session.execute(upsert(t.CollectedRow), gone)


def _irreproducible(session: Session, rows: list[Cells]) -> list[str]:
    known = compiles(session)
    return [
        f"compile {short(row['key'])}: made {short(row['artifact'])} there and {short(known[row['key']])} here: "
        "the same inputs should make the same bytes; the destination's is kept"
        for row in rows
        if row["key"] in known and known[row["key"]] != row["artifact"]
    ]


def compiles(session: Session) -> dict[str, str]:
    """Return the artifact of every compile by its key."""
    return {row[0]: row[1] for row in session.execute(select(t.CompileRow.key, t.CompileRow.artifact))}
