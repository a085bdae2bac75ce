"""The catalog commands without parsing and printing: check, free, compare, merge; options in, plain rows out."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from llmbuild.catalog import garbage, verify
from llmbuild.catalog.exchange import diff as differences
from llmbuild.catalog.exchange import merge, publish, pull, signing
from llmbuild.catalog.location import is_url
from llmbuild.catalog.place import FILE, URL_FILE, exists
from llmbuild.catalog.references import RECORDS, is_published
from llmbuild.catalog.schema import migrated_copy
from llmbuild.catalog.store import BlobStore
from llmbuild.catalog.writer import Catalog
from llmbuild.cli.output import Report
from llmbuild.cli.requests import StudyRequest
from llmbuild.cli.sizes import size_of
from llmbuild.errors import InputError
from llmbuild.runtime import reader, trust
from llmbuild.runtime.trust import Policy
from llmbuild.search.front import FLOORS
from llmbuild.spec.slo import METRICS
from llmbuild.system.terminal import cell

PRIVATE = ("orphan", "stranger")
"""Findings that are normal in a publication: its database has no manifest, and its folder keeps the previous one."""
Say = Callable[[str], None]


@contextlib.contextmanager
def opened(folder: Path, alone: bool = False) -> Iterator[Catalog]:
    """Open an existing catalog.

    Raises:
        InputError: there is none.
    """
    if is_published(folder) and not alone:
        with pull.opened(folder) as published:
            yield published
        return
    if not exists(folder):
        raise InputError(f"no catalog in {folder}: build one with `llmbuild build`, or name one with -C")
    if not alone and not _writable(folder):
        with _read_only(folder) as catalog:
            yield catalog
        return
    catalog = Catalog(folder, alone)
    try:
        yield catalog
    finally:
        catalog.close()


def _writable(folder: Path) -> bool:
    """Return whether a catalog can be written; for rows in a server, the server decides."""
    return os.access(folder, os.W_OK) and ((folder / URL_FILE).is_file() or os.access(folder / FILE, os.W_OK))


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[Catalog]:
    """Open a private copy of the rows of a read-only catalog; the blobs are used in place."""
    with migrated_copy(folder) as copy:
        if (folder / RECORDS).is_dir():
            shutil.copytree(folder / RECORDS, copy / RECORDS)
        catalog = Catalog(copy)
        catalog.blobs = BlobStore(folder)
        try:
            yield catalog
        finally:
            catalog.close()


def check(folder: Path, rule: Policy, progress: Callable[[int, int], None]) -> Report:
    """Verify everything in a catalog; of a published one the signature too."""
    trust.require(folder, rule)
    with opened(folder) as catalog:
        found = verify.verify(catalog, progress)
        if is_published(folder):
            some = trust.partial(folder) is not None
            found = [f for f in found if not (some and f.problem == "missing") and f.problem not in PRIVATE]
            found += verify.promised(folder, catalog)
        count, size = _amount(catalog)
    wrong = sum(f.wrong for f in found)
    told = f"{wrong} wrong, {len(found) - wrong} to clean up" if found else "all is as it should be"
    return Report([f.row() for f in found], f"{count} blobs, {size / 1e6:.1f} MB: {told}", wrong == 0)


def _amount(catalog: Catalog) -> tuple[int, int]:
    sizes = [size for _, size in catalog.blobs.digests()]
    return len(sizes), sum(sizes)


def collect(folder: Path, budget: str | None, dry_run: bool) -> Report:
    """Remove blobs that no front and no publication needs."""
    alone = not dry_run or is_published(folder)  # a read-only one is refused
    with opened(folder, alone) as catalog:
        swept = garbage.collect(catalog, None if budget is None else size_of("--size", budget), dry_run)
    rows: list[dict[str, object]] = [{"blob": r.digest, "kind": r.kind, "bytes": r.size_bytes} for r in swept.removed]
    done = "would be freed" if dry_run else "freed"
    told = f"{swept.freed_bytes / 1e6:.1f} MB {done}, {swept.kept_bytes / 1e6:.1f} MB kept"
    if swept.over:
        told += f"; the fronts and what was published need {swept.over / 1e6:.1f} MB more than the budget"
    return Report(rows, told, swept.over == 0)


def diff(before: str, after: str, noise: float, rule: Policy) -> Report:
    """Compare two catalogs: folders, or publications anywhere."""
    if noise != noise:
        raise InputError("--noise nan: not a number: write 0.05")
    with looked_into(before, rule) as a, looked_into(after, rule) as b:
        ruler = differences.Ruler(noise, FLOORS)
        found = [
            *differences.bytes_changed(_compiles(a), _compiles(b)),
            *differences.compare(reader.variants(a, everything=True), reader.variants(b, everything=True), ruler),
        ]
    counts = {kind: sum(c.kind == kind for c in found) for kind in dict.fromkeys(c.kind for c in found)}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no difference"
    return Report([c.row() for c in found], told, not any(c.kind in differences.FAILING for c in found))


@contextlib.contextmanager
def looked_into(location: str, rule: Policy) -> Iterator[Path]:
    """Yield a folder with the rows of a catalog or publication; blobs are not fetched."""
    folder = Path(location)
    if not is_url(location) and folder.exists() and not (exists(folder) or is_published(folder)):
        raise InputError(f"{folder}: neither a catalog nor a publication: `llmbuild build -C {folder}` makes one")
    if not is_url(location) and (exists(folder) or is_published(folder) or not folder.exists()):
        trust.require(folder, rule) if is_published(folder) else None
        yield folder
        return
    with TemporaryDirectory(prefix="llmbuild-") as name:
        pull.rows_only(location, Path(name), rule)
        yield Path(name)


def _compiles(folder: Path) -> dict[str, str]:
    with reader.opened(folder) as connection:
        return {row[0]: row[1] for row in connection.execute("SELECT key, artifact FROM compile")}


def join(sources: Sequence[str], into: Path) -> Report:
    """Merge catalogs into one."""
    for name in sources:
        with opened(Path(name)):  # all sources are opened before anything is written
            pass
    catalog = Catalog(into)
    rows: list[dict[str, object]] = []
    conflicts: list[str] = []
    try:
        for name in sources:
            with opened(Path(name)) as source:
                done = merge.merge(source, catalog)
            rows.append({"source": name, **{k: done.rows.get(k, 0) for k in ("variant", "measurement", "standing")}})
            rows[-1] |= {"blobs": done.blobs, "bytes": done.blob_bytes}
            conflicts += done.conflicts
    finally:
        catalog.close()
    return Report(rows, "\n".join(map(cell, conflicts)) or "no conflicts", True)


def _check_models(folder: Path, models: Sequence[str], location: str) -> None:
    """Refuse a model that the catalog does not have, and a model in the position of the destination."""
    there = reader.models(folder)
    if not models and location in there and not Path(location).exists():
        raise InputError(
            f"{location} is a model of {folder}: name a place to publish it to as well, "
            f"`llmbuild publish {location} DEST`, or ./{location} for a folder of that name"
        )
    if unknown := [model for model in models if model not in there]:
        raise InputError(f"no model {unknown[0]} in {folder}: it has {', '.join(there) or 'none'}")


def send(folder: Path, models: Sequence[str], location: str, key: Path | None, tell: publish.Tell) -> Report:
    """Publish the fronts of a catalog."""
    with opened(folder) as catalog:
        _check_models(folder, models, location)
        sent = publish.publish(catalog, models, location, key, tell)
    row: dict[str, object] = {
        "publication": sent.digest,
        "destination": location,
        "blobs": sent.blobs,
        "bytes": sent.bytes,
        "sent_blobs": sent.sent_blobs,
        "sent_bytes": sent.sent_bytes,
        "signed": sent.signed,
    }
    told = "published" if sent.changed else "nothing to do: this very publication is there already"
    if not is_published(folder) and not _writable(folder):
        told += f"; {folder} cannot be written, so its `llmbuild gc` does not know of this publication"
    return Report([row], f"{told}; {sent.sent_bytes / 1e6:.1f} of {sent.bytes / 1e6:.1f} MB sent", True)


def study(request: StudyRequest) -> Report:
    """Add the searches of a model to an Optuna storage, one study for each set of inputs."""
    from llmbuild.search.export import export, objectives_of

    if wrong := [name for name in request.objectives if name not in METRICS]:
        raise InputError(f"--objective {wrong[0]}: no metric; there are {', '.join(METRICS)}")
    with opened(request.catalog) as catalog:
        scopes = catalog.scopes_of(request.model)
        there = {scope: target for scope, target in scopes.items() if request.target in (None, target)}
        if not there:
            _check_models(request.catalog, [request.model], "")
            raise InputError(
                f"no build of {request.model} on {request.target} in {request.catalog}: "
                f"it has {', '.join(sorted(set(scopes.values()))) or 'none'}"
            )
        rows: list[dict[str, object]] = []
        for scope, target in there.items():
            trials = catalog.trials(scope)
            objectives = request.objectives or objectives_of(trials)
            if not objectives:
                continue  # compiled and never measured: a study needs values
            done = export(trials, objectives, request.storage, f"{request.model}-{target}-{scope[:8]}")
            rows.append(
                {
                    "study": done.study,
                    "target": target,
                    "objectives": " ".join(done.objectives),
                    "added": done.added,
                    "known": done.known,
                    "failed": done.failed,
                }
            )
    if not rows:
        raise InputError(f"nothing of {request.model} was measured in {request.catalog}: `llmbuild build` does it")
    return Report(rows, f"optuna-dashboard {request.storage} shows them", True)


def keys(name: Path) -> Report:
    """Make a pair of keys."""
    secret, public = signing.make_keys(name)
    return Report([{"secret": str(secret), "public": str(public)}], "keep the secret one to yourself", True)
