"""The commands that keep, compare, publish and pull catalogs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmbuild.options import PATH, PLACE, catalog_option, format_options, print_rows, slo_options, trust_options
from llmbuild.shown import replace_line


@click.command(short_help="Read every byte of a catalog and check it.")
@catalog_option
@format_options
@trust_options
def verify(catalog: str, form: str | None, **options: Any) -> int:
    """Read every byte of a catalog and check it: digests, the database, what rows name; exit 1 if anything is wrong."""
    from llmbuild import upkeep

    report = upkeep.check(Path(catalog), _policy(options), _counter("checked"))
    return _printed(report, form)


@click.command()
@catalog_option
@format_options
@click.option("--size", metavar="SIZE", help="Free only as much as it takes to get below this, such as 2GB.")
@click.option("-n", "--dry-run", is_flag=True, help="List what would be removed; remove nothing.")
def gc(catalog: str, form: str | None, size: str | None, dry_run: bool) -> int:
    """Free blobs that no front, no default and no publication needs. Rows and measurements stay."""
    from llmbuild import upkeep

    return _printed(upkeep.collect(Path(catalog), size, dry_run), form)


@click.command(short_help="Compare two catalogs or publications.")
@click.argument("before", type=PLACE)
@click.argument("after", type=PLACE)
@format_options
@trust_options
@click.option("--noise", type=click.FloatRange(0, 10), default=0.05, show_default=True, help="Relative, of timings.")
@click.option("--fail-on-regression", is_flag=True, help="Exit 1 on a regression, a lost front, or changed bytes.")
def diff(before: str, after: str, form: str | None, noise: float, fail_on_regression: bool, **options: Any) -> int:
    """Compare two catalogs, folders or publications: fronts, readings beyond noise, bytes of the same key."""
    from llmbuild import upkeep

    report = upkeep.diff(before, after, noise, _policy(options))
    code = _printed(report, form)
    return code if fail_on_regression else 0


@click.command(short_help="Add catalogs or published folders to another catalog.")
@click.argument("sources", nargs=-1, required=True, type=PLACE)
@catalog_option
@format_options
def merge(sources: tuple[str, ...], catalog: str, form: str | None) -> int:
    """Add the rows and blobs of catalogs or published folders to another one."""
    from llmbuild import upkeep

    return _printed(upkeep.join(sources, Path(catalog)), form)


@click.command(short_help="Publish the fronts of MODELs, or of all.")
@click.argument("arguments", nargs=-1, required=True, type=PLACE, metavar="[MODEL]... DEST")
@catalog_option
@format_options
@click.option("--sign", "key", type=PATH, help="Sign with this Ed25519 key (PEM).")
def publish(arguments: tuple[str, ...], catalog: str, form: str | None, key: Path | None) -> int:
    """Publish the fronts of MODELs, or of all, to a folder, an fsspec URL (s3://, gs://) or oci://HOST/NAME:TAG."""
    from llmbuild import upkeep

    *models, place = arguments
    return _printed(upkeep.send(Path(catalog), models, place, key, _counter("sent")), form)


@click.command(short_help="Fetch from a publication what the SLO needs on this host.")
@click.argument("source", type=PLACE)
@click.option("-m", "--model", "models", multiple=True, help="Only this model; may be given again.")
@slo_options
@click.option("--all", "everything", is_flag=True, help="Everything, not only what the SLO picks on this host.")
@catalog_option
@format_options
@trust_options
def pull(source: str, catalog: str, form: str | None, **options: Any) -> int:
    """Fetch from a publication what the SLO needs on this host; exit 3 when nothing meets it."""
    from llmbuild import upkeep

    return _printed(upkeep.fetch(source, Path(catalog), options, _policy(options), _counter("fetched")), form)


@click.command(short_help="Make a pair of Ed25519 keys to sign and trust with.")
@click.argument("name", type=PATH)
@format_options
def keys(name: Path, form: str | None) -> int:
    """Make a pair of Ed25519 keys, NAME.key to sign with and NAME.pub to hand out."""
    from llmbuild import upkeep

    return _printed(upkeep.keys(name), form)


COMMANDS = (verify, gc, diff, merge, publish, pull, keys)


def _policy(options: dict[str, Any]) -> Any:
    from llmbuild.runtime.trust import policy

    return policy(list(options.pop("trust")), options.pop("allow_unsigned"))


def _printed(report: Any, form: str | None) -> int:
    if report.rows or form:
        print_rows(report.rows, form)
    click.echo(report.closing, err=True)
    return 0 if report.well else 1


def _counter(done: str) -> Callable[..., None]:
    """Return what shows bytes on a terminal, on a line that the next one replaces; a log file gets none."""
    if not sys.stderr.isatty():
        return lambda *_: None

    def tell(*told: Any) -> None:
        some, total = told[-2:]
        replace_line(sys.stderr, f"{some / 1e6:.1f} of {total / 1e6:.1f} MB {done}")

    return tell
