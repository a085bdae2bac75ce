"""Output of commands: rows as a table, JSON or CSV, and the results of several jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from llmbuild.errors import LlmbuildError, NothingUsable
from llmbuild.system.terminal import data

if TYPE_CHECKING:
    from llmbuild.build.job import Job
    from llmbuild.cli.building import Built


@dataclass(frozen=True)
class Report:
    """Rows for stdout, one closing line of text, and whether all is well."""

    rows: Sequence[Mapping[str, object]]
    closing: str
    well: bool


def over(jobs: Sequence[Callable[[], Job]], keep_going: bool, act: Callable[[Job], Built], form: str | None) -> int:
    """Run every job and print all results; with `-k` continue after an error and end with the first error's code.

    Tables are printed as each job ends; JSON and CSV contain the rows of all jobs, and so does a plan.
    """
    codes: list[int] = []
    done: list[Built] = []
    for job in jobs:
        try:
            built = act(job())
            done.append(built)
            if built.plan is None and form is None:
                print_built(built, form)
            if not built.usable:
                raise NothingUsable(built.advice)
        except LlmbuildError as error:
            if not keep_going:
                _print_all(done, form)
                raise
            click.echo(f"error: {error}", err=True)
            codes.append(error.exit_code)
    _print_all(done, form)
    return next((code for code in codes if code), 0)


def _print_all(done: Sequence[Built], form: str | None) -> None:
    planned = [row for built in done for row in built.plan or ()]
    if planned:
        print_rows(planned, form)
    elif form and done:
        from llmbuild.report.rows import public

        print_rows([row for built in done for row in built.made or map(public, built.rows)], form)


def print_built(built: Built, form: str | None) -> None:
    """Print the rows of a build."""
    from llmbuild.report.rows import footnotes, front_table

    if built.made is not None:
        print_rows(built.made, form)
    elif form:
        print_public(built.rows, form)
    elif built.rows:
        click.echo(front_table(built.rows))
        click.echo("\n".join(footnotes(built.rows)), err=True)


def print_public(rows: Sequence[Mapping[str, object]], form: str | None, none: str = "nothing to list") -> int:
    """Print the columns of the contract."""
    from llmbuild.report.rows import public

    return print_rows([public(row) for row in rows], form, none)


def print_rows(rows: Sequence[Mapping[str, object]], form: str | None, none: str = "nothing to list") -> int:
    """Print rows as a table, JSON or CSV; for no rows, print `none` in place of a table."""
    from llmbuild.report.rows import as_csv, as_json
    from llmbuild.report.table import table, terminal

    if form == "json":
        click.echo(as_json(rows))
    elif form == "csv":
        data(as_csv(rows) + "\n")
    elif rows:
        names = list(rows[0])
        click.echo(table(names, [[str(row[n]) for n in names] for row in rows], range(len(names)), terminal()))
    else:
        click.echo(none, err=True)
    return 0
