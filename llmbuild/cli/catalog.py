"""The commands that keep, compare, publish and pull catalogs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmbuild.cli.options import (
    PATH,
    PLACE,
    catalog_option,
    format_options,
    selection_of,
    slo_options,
    trust_of,
    trust_options,
)
from llmbuild.cli.output import Report, print_rows
from llmbuild.cli.requests import PullRequest, StudyRequest, Trust
from llmbuild.system.terminal import replace_line

if TYPE_CHECKING:
    from llmbuild.runtime.trust import Policy


@click.command(short_help="Read every byte of a catalog and check it.")
@catalog_option
@format_options
@trust_options
def verify(catalog: str, form: str | None, **options: Any) -> int:
    """Read every byte of a catalog and check it: digests, the database, what rows name; exit 1 if anything is wrong."""
    from llmbuild.cli import maintenance

    report = maintenance.check(Path(catalog), _policy(trust_of(options)), _counter("checked"))
    return _printed(report, form)


@click.command()
@catalog_option
@format_options
@click.option("--size", metavar="SIZE", help="Free only as much as it takes to get below this, such as 2GB.")
@click.option("-n", "--dry-run", is_flag=True, help="List what would be removed; remove nothing.")
def gc(catalog: str, form: str | None, size: str | None, dry_run: bool) -> int:
    """Free blobs that no front, default or publication needs. Rows and measurements stay."""
    from llmbuild.cli import maintenance

    return _printed(maintenance.collect(Path(catalog), size, dry_run), form)


@click.command(short_help="Compare two catalogs or publications.")
@click.argument("before", type=PLACE)
@click.argument("after", type=PLACE)
@format_options
@trust_options
@click.option("--noise", type=click.FloatRange(0, 10), default=0.05, show_default=True, help="Relative, of timings.")
@click.option("--fail-on-regression", is_flag=True, help="Exit 1 on a regression, a lost front, or changed bytes.")
def diff(before: str, after: str, form: str | None, noise: float, fail_on_regression: bool, **options: Any) -> int:
    """Compare two catalogs, folders or publications: fronts, readings beyond noise, bytes of the same key."""
    from llmbuild.cli import maintenance

    report = maintenance.diff(before, after, noise, _policy(trust_of(options)))
    code = _printed(report, form)
    return code if fail_on_regression else 0


@click.command(short_help="Add catalogs or published folders to another catalog.")
@click.argument("sources", nargs=-1, required=True, type=PLACE)
@catalog_option
@format_options
def merge(sources: tuple[str, ...], catalog: str, form: str | None) -> int:
    """Add the rows and blobs of catalogs or published folders to another one."""
    from llmbuild.cli import maintenance

    return _printed(maintenance.join(sources, Path(catalog)), form)


@click.command(short_help="Publish the fronts of MODELs, or of all.")
@click.argument("arguments", nargs=-1, required=True, type=PLACE, metavar="[MODEL]... DEST")
@catalog_option
@format_options
@click.option("--sign", "key", type=PATH, help="Sign with this Ed25519 key (PEM).")
def publish(arguments: tuple[str, ...], catalog: str, form: str | None, key: Path | None) -> int:
    """Publish the fronts of MODELs, or of all, to a folder, an fsspec URL (s3://, gs://) or oci://HOST/NAME:TAG."""
    from llmbuild.cli import maintenance

    *models, place = arguments
    return _printed(maintenance.send(Path(catalog), models, place, key, _counter("sent")), form)


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
    from llmbuild.cli import fetching

    asked = {name: options[name] for name in ("models", "everything")}
    request = PullRequest(source, Path(catalog), selection=selection_of(options), trust=trust_of(options), **asked)
    return _printed(fetching.fetch(request, _policy(request.trust), _counter("fetched")), form)


@click.command(short_help="Export the searches of MODEL as studies of Optuna.")
@click.argument("model")
@click.option("--storage", required=True, metavar="URL", help="Where Optuna keeps studies, such as sqlite:///study.db.")
@click.option("-t", "--target", help="Only the searches for this target.")
@click.option("--objective", "objectives", multiple=True, metavar="METRIC", help="A value; may be given again.")
@catalog_option
@format_options
def study(model: str, storage: str, catalog: str, form: str | None, **options: Any) -> int:
    """Export the searches of MODEL as studies of Optuna, for optuna-dashboard and optuna.visualization."""
    from llmbuild.cli import maintenance

    return _printed(maintenance.study(StudyRequest(Path(catalog), model, storage, **options)), form)


@click.command(short_help="Make a pair of Ed25519 keys to sign and trust with.")
@click.argument("name", type=PATH)
@format_options
def keys(name: Path, form: str | None) -> int:
    """Make a pair of Ed25519 keys, NAME.key to sign with and NAME.pub to hand out."""
    from llmbuild.cli import maintenance

    return _printed(maintenance.keys(name), form)


COMMANDS = (verify, gc, diff, merge, publish, pull, study, keys)


def _policy(trust: Trust) -> Policy:
    from llmbuild.runtime.trust import policy

    return policy(trust.keys, trust.allow_unsigned)


def _printed(report: Report, form: str | None) -> int:
    if report.rows or form:
        print_rows(report.rows, form)
    click.echo(report.closing, err=True)
    return 0 if report.well else 1


def _counter(done: str) -> Callable[..., None]:
    """Return a function that shows a byte count on one terminal line; a log file gets none."""
    if not sys.stderr.isatty():
        return lambda *_: None

    def tell(*told: int) -> None:
        some, total = told[-2:]
        replace_line(sys.stderr, f"{some / 1e6:.1f} of {total / 1e6:.1f} MB {done}")

    return tell
