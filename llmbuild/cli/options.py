"""Shared options of commands, and the requests of groups of options."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from llmbuild.cli.requests import Selection, Trust
from llmbuild.errors import InputError
from llmbuild.spec.recipe import SAMPLERS

CATALOG = "LLMBUILD_CATALOG"
F = TypeVar("F", bound=Callable[..., object])


class _Named(click.Path):
    """A file, a folder or a place; an empty name, as from an unset variable of a script, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name."""
        if value == "":
            self.fail("the name is empty; `.` is the current folder", param, ctx)
        return super().convert(value, param, ctx)


class _Text(click.types.StringParamType):
    """A text that is not a path: only file names may contain bytes that are not UTF-8."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text."""
        text: str = super().convert(value, param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"{text!a} is no UTF-8 text", param, ctx)
        return text


PATH, PLACE, TEXT = _Named(path_type=Path), _Named(path_type=str), _Text()


class Shared(click.Option):
    """An option before the command's name, as make's, or after it; two different values are refused."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser collect all given values, not only the last."""
        action = "append_const" if self.is_flag else "append"
        parser.add_option(self, self.opts, self.name, action, self.nargs, self.flag_value)

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[object, ParameterSource]:
        """Return the one value given before or after the command's name."""
        said = list(opts.get(str(self.name), ()))
        before = ctx.parent.params.get(str(self.name)) if ctx.parent is not None else None
        values = list(dict.fromkeys([*([] if before is None else [before]), *said]))
        if len(values) > 1:
            told = " and ".join(f"--{value}" if self.is_flag else f"{self.opts[0]} {value}" for value in values[:2])
            raise click.UsageError(f"{told} are both given: keep one", ctx)
        return (values[0], ParameterSource.COMMANDLINE) if values else super().consume_value(ctx, {})


def catalog_option(command: F) -> F:
    """Add `-C`."""
    return click.option(
        "-C",
        "--catalog",
        cls=Shared,
        envvar=CATALOG,
        type=PLACE,
        default="catalog",
        show_default=True,
        callback=_folder,
        help="Folder of the catalog, or postgresql://...",
    )(command)


def _folder(context: click.Context, option: click.Parameter, value: str) -> str:
    """Return the folder of a catalog; for a URL the rows are in a server, the blobs in a local folder."""
    if context.get_parameter_source(str(option.name)) == ParameterSource.DEFAULT and os.environ.get(CATALOG) == "":
        raise InputError(f"${CATALOG} is empty: unset it, or name a folder")
    from llmbuild.catalog.location import is_url

    if not is_url(value):
        return value
    from llmbuild.catalog.schema import folder_of

    return str(folder_of(value))


def format_options(command: F) -> F:
    """Add `--json` and `--csv`."""
    command = click.option("--csv", "form", cls=Shared, flag_value="csv", help="CSV on stdout.")(command)
    return click.option("--json", "form", cls=Shared, flag_value="json", help="JSON on stdout.")(command)


def before_command(command: F) -> F:
    """Add the options that may precede the command's name; the command itself takes them."""
    command = click.option(
        "-C", "--catalog", cls=Shared, type=PLACE, help="Folder of the catalog, or postgresql://..."
    )(command)
    return format_options(command)


def check_taken(group: click.Context, command: click.Command) -> None:
    """Refuse options before the name of a command that does not have them.

    Raises:
        UsageError: an option would be ignored.
    """
    taken = {(each.name, each.is_flag and each.flag_value) for each in command.params if isinstance(each, Shared)}
    for each in group.command.params:
        value = group.params.get(str(each.name))
        if not isinstance(each, Shared) or value is None or (each.is_flag and value != each.flag_value):
            continue
        if (each.name, each.is_flag and value) not in taken:
            raise click.UsageError(f"`llmbuild {command.name}` takes no {each.opts[0]}", group)


LISTED_BY = {
    "fleet": "a fleet is a YAML file with nodes and services; recipes/fleets has some",
    "recipes": "a recipe is a YAML file; `llmbuild recipes FOLDER` lists those of a folder",
    "what": "name a recipe's file, or variants as `llmbuild query --all` lists them",
    "variant": "`llmbuild query --all` lists the variants of a catalog; the first digits of one are enough",
    "model": "`llmbuild query` lists the models of a catalog",
    "models": "`llmbuild query` lists the models of a catalog",
    "arguments": "name a folder, s3://..., gs://... or oci://HOST/NAME:TAG to publish to",
    "source": "name what `llmbuild publish` wrote: a folder, s3://..., gs://... or oci://HOST/NAME:TAG",
    "sources": "name catalogs or published folders; -C names the one they are added to",
    "before": "name two catalogs or publications",
    "after": "name a second catalog or publication to compare with",
    "server": "vllm or sglang, then its launch line in quotes, or a configuration file",
    "line": "give the launch line in quotes, such as 'vllm serve org/Model', or a configuration file",
    "name": "NAME.key and NAME.pub are written",
}
"""Instructions for a missing argument, by its name."""


def teaching(error: click.UsageError) -> click.UsageError:
    """Return the error with instructions for the missing argument."""
    if isinstance(error, click.MissingParameter) and error.param is not None:
        told = LISTED_BY.get(str(error.param.name))
        if told and isinstance(error.param, click.Argument):
            return click.UsageError(f"{error.param.human_readable_name} is missing: {told}", error.ctx)
    return error


class ByOption(click.Command):
    """A command that takes its model as an option, and reports that where an argument is given."""

    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse arguments and name the correct option."""
        rest = super().parse_args(ctx, args)
        if rest:
            ctx.fail(f"unexpected argument {rest[0]!r}: a model is named with -m")
        return rest


def on_option(command: F) -> F:
    """Add the option that selects the measuring machine."""
    return click.option(
        "--on",
        metavar="PLACE",
        help="ssh://[USER@]HOST[:PORT][/PYTHON]: compile here, measure there, for the highest target that it supports. "
        "ray, ray://HOST:PORT, slurm, slurm://PARTITION?OPTIONS: compile on any node of a cluster, "
        "measure on its devices.",
    )(command)


def trust_options(command: F) -> F:
    """Add the options that decide which catalogs are trusted."""
    for option in (
        click.option("--allow-unsigned", is_flag=True, help="Open an unsigned catalog although keys are trusted."),
        click.option(
            "--trust",
            multiple=True,
            metavar="PATH",
            type=PLACE,
            help="A public key, or a folder of them; else $LLMBUILD_TRUST.",
        ),
    ):
        command = option(command)
    return command


def slo_options(command: F) -> F:
    """Add the options that pick a row."""
    for option in (
        click.option("--objective", metavar="METRIC", help="What to improve; the first SLO's metric if left out."),
        click.option("--slo", multiple=True, metavar="BOUND", help="What must hold, such as 'tpot_s<=0.02'."),
        click.option("--workload", help="Only rows of this workload."),
        click.option("-t", "--target", help="Only rows of this target."),
    ):
        command = option(command)
    return command


def lengths_option(command: F) -> F:
    """Add the option that says how long requests are."""
    return click.option(
        "--lengths",
        metavar="PROMPT:OUTPUT",
        default="128:64",
        show_default=True,
        help="Medians of the requests' tokens, for bounds of load.",
    )(command)


def selection_of(options: Mapping[str, Any]) -> Selection:
    """Return the values of `slo_options`."""
    return Selection(tuple(options["slo"]), options["objective"], options["target"], options["workload"])


def trust_of(options: Mapping[str, Any]) -> Trust:
    """Return the values of `trust_options`."""
    return Trust(tuple(options["trust"]), options["allow_unsigned"])


def build_options(command: F) -> F:
    """Add the options of a build."""
    for option in (
        click.option(
            "--random-init", is_flag=True, help="Take the model's shape only; weights are random, quality is absent."
        ),
        click.option("--set", "pinned", multiple=True, metavar="KNOB=VALUE", help="Pin a knob; may be given again."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the search."),
        click.option(
            "--sampler",
            type=click.Choice(SAMPLERS),
            help="Sampler: llmbuild's (gp, auto) or one of Optuna's; default: the recipe's.",
        ),
        click.option("--budget", metavar="TIME", help="Stop the search after this long, such as 20m."),
        click.option("--trials", type=click.IntRange(min=1), help="Unique evaluations, known ones included."),
        click.option("-B", "--always-make", "force", is_flag=True, help="Make everything again."),
        click.option(
            "-k", "--keep-going", is_flag=True, help="Go on with the other recipes and targets when one fails."
        ),
        click.option(
            "-j",
            "--jobs",
            type=click.IntRange(1, 64),
            default=1,
            show_default=True,
            help="Number of parallel compiles.",
        ),
        click.option("-n", "--dry-run", is_flag=True, help="Print each step and why it would run; do nothing."),
        click.option("--explain", is_flag=True, help="Give each step's key, and each field of it that changed."),
        click.option("-t", "--target", "targets", multiple=True, help="Target name or file; the host if left out."),
    ):
        command = option(command)
    return command
