"""The commands: parse, call one function, print. The only place where an error becomes an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import llmbuild
from llmbuild import cli_catalog, edge
from llmbuild.errors import InputError, LlmbuildError, NothingUsable, NoVariant
from llmbuild.options import (
    PATH,
    PLACE,
    TEXT,
    ByOption,
    Shared,
    before_command,
    build_options,
    catalog_option,
    check_heard,
    format_options,
    on_option,
    over,
    print_built,
    print_public,
    print_rows,
    slo_options,
    teaching,
    trust_options,
)
from llmbuild.shown import clear_line, data, guarded
from llmbuild.strict import dumps

if TYPE_CHECKING:
    from llmbuild.runtime.model import Model

INTERRUPTED = 130
TOLD = 200
"""Variants above which `pick` gives their verdicts only when asked."""


class Group(click.Group):
    """Turns every error of ours into one message and its exit code; a traceback is shown under `--debug` only."""

    debug = False

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, whose texts must be UTF-8, and that takes `--debug` as `llmbuild` itself does."""
        for parameter in cmd.params:
            if parameter.type is click.STRING:
                parameter.type = TEXT
        cmd.params.append(_debug_option())
        super().add_command(cmd, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command, whose output is guarded to the last word."""
        with guarded():
            return self.main(*args, **kwargs)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command and exit with its code."""
        self.debug = False
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        kwargs["standalone_mode"] = False
        try:
            edge.prepare()
            try:
                code = super().main(*args, **kwargs)
            finally:
                clear_line()
            sys.stdout.flush()
        except click.exceptions.Exit as done:
            code = done.exit_code
        except click.ClickException as error:
            (teaching(error) if isinstance(error, click.UsageError) else error).show()
            code = error.exit_code
        except (click.exceptions.Abort, KeyboardInterrupt):
            click.echo("interrupted; what was finished is kept", err=True)
            code = INTERRUPTED
        except LlmbuildError as error:
            if self.debug:
                raise
            click.echo(f"error: {error}", err=True)
            code = error.exit_code
        except (edge.PipeClosed, BrokenPipeError):
            edge.quiet()
            code = edge.CLOSED_PIPE
        except OSError as error:
            if self.debug:
                raise
            told = edge.refusal(error)
            click.echo(f"error: {told}", err=True)
            code = InputError.exit_code
        except Exception as error:  # the one broad except: a bug of ours must not look like the user's fault
            if self.debug:
                raise
            click.echo(
                f"internal error: {type(error).__name__}: {error}\nrun again with --debug and report it", err=True
            )
            code = 1
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the command line; help may be printed to a pipe that is closed."""
        with edge.piped():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what it prints may go to a pipe that is closed."""
        with edge.piped():
            return super().invoke(ctx)


def _debug_option() -> click.Option:
    def note(_: click.Context, __: click.Parameter, value: bool) -> None:
        main.debug = main.debug or value

    return click.Option(["--debug"], is_flag=True, expose_value=False, callback=note, help="Show tracebacks.")


EPILOG = """\b
First:       llmbuild doctor; llmbuild recipes FOLDER; llmbuild build RECIPE
Then:        llmbuild query; llmbuild run MODEL
Exit codes:  0 done, 1 built nothing usable, 2 bad input,
             3 no variant meets the SLO, 130 interrupted"""


@click.group(cls=Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(llmbuild.__version__, prog_name="llmbuild")
@before_command
@click.pass_context
def main(ctx: click.Context, /, **_: Any) -> None:
    """Make for LLM binaries: build, measure and pick IREE variants of a model."""
    check_heard(ctx, main.commands[str(ctx.invoked_subcommand)])


main.params.append(_debug_option())


@main.command(short_help="Search, measure and keep the front of each RECIPE.")
@click.argument("recipes", nargs=-1, required=True, type=PATH)
@build_options
@click.option(
    "--until", type=click.Choice(["import", "compile", "profile"]), help="Stop every variant after this step."
)
@on_option
@catalog_option
@format_options
def build(recipes: tuple[Path, ...], form: str | None, **options: Any) -> int:
    """Build each RECIPE for each target: search, measure, and keep the front."""
    from llmbuild import commands

    jobs = commands.each(recipes, options)
    commands.ahead(jobs, options)
    return over(jobs, options, lambda job: commands.build(job, options), form)


@main.command("compile", short_help="Compile each RECIPE for each target; nothing is run.")
@click.argument("recipes", nargs=-1, required=True, type=PATH)
@build_options
@catalog_option
@format_options
def compile_(recipes: tuple[Path, ...], form: str | None, **options: Any) -> int:
    """Compile each RECIPE for each target; nothing is run, so the target need not be this host."""
    from llmbuild import commands

    jobs = commands.each(recipes, options)
    commands.ahead(jobs, {**options, "until": "compile"})
    return over(jobs, options, lambda job: commands.compile_only(job, options), form)


@main.command(short_help="Measure what is compiled: a RECIPE, or VARIANTs by digest.")
@click.argument("what", nargs=-1, required=True, type=PLACE)
@catalog_option
@format_options
@on_option
@click.option("-t", "--target", "targets", multiple=True, help="Target name or file; the host if left out.")
@click.option("--random-init", is_flag=True, help="The recipe was compiled with --random-init.")
def profile(what: tuple[str, ...], form: str | None, **options: Any) -> int:
    """Measure what is compiled, on this machine: a RECIPE, or VARIANTs by digest."""
    from llmbuild import commands

    built = commands.profile(what, options)
    print_built(built, form)
    if not built.usable:
        raise NothingUsable(built.advice)
    return 0


@main.command(short_help="Tune the costliest dispatches of a VARIANT on this machine.")
@click.argument("variant")
@catalog_option
@format_options
def tune(variant: str, form: str | None, **options: Any) -> int:
    """Tune the costliest dispatches of a VARIANT on this machine; later builds for its target try what won."""
    from llmbuild import commands

    return print_rows(commands.tune(variant, options), form)


@main.command(cls=ByOption)
@click.option("-m", "--model", help="Only rows of this model.")
@slo_options
@click.option("--all", "everything", is_flag=True, help="Dominated, infeasible and failed variants too.")
@catalog_option
@format_options
def query(form: str | None, **options: Any) -> int:
    """List the variants that meet an SLO, the best first."""
    from llmbuild import commands
    from llmbuild.report.listings import nothing_found
    from llmbuild.report.rows import front_table

    rows = commands.query(options)
    if form or not rows:
        return print_public(rows, form, "" if form else nothing_found(options))
    click.echo(front_table(rows))
    return 0


@main.command(cls=ByOption, short_help="Print the one variant a loader would open here, and why.")
@click.option("-m", "--model", help="The model; not needed where the catalog has only one.")
@slo_options
@click.option("--lock", type=PATH, help="Pin the pick in this file, for `run --lock`.")
@click.option("--as", "cpu", metavar="CPU", help="Pick for a host with this CPU instead, such as haswell or zen4.")
@click.option("--why", is_flag=True, help="Give the verdict on every variant, however many there are.")
@catalog_option
@format_options
@trust_options
def pick(form: str | None, lock: Path | None, why: bool, **options: Any) -> int:
    """Print the one variant a loader would open on this host, and say why on stderr."""
    from llmbuild.fleet.hosts import facts_of
    from llmbuild.report.rows import front_table, public
    from llmbuild.runtime import trust
    from llmbuild.runtime.lock import write
    from llmbuild.runtime.model import pick as choose
    from llmbuild.runtime.reader import count

    try:
        trust.require(Path(options["catalog"]), trust.policy(options["trust"], options["allow_unsigned"]))
        made = choose(
            options["catalog"],
            options["model"],
            options["slo"],
            options["objective"],
            options["target"],
            options["workload"],
            facts_of(options["cpu"]) if options["cpu"] else None,
        )
    except NoVariant as error:
        if form == "json" and error.pick is not None and error.pick.nearest:
            click.echo(
                dumps({"nearest": public(error.pick.nearest), "distance": error.pick.distance, "reason": str(error)})
            )
        raise
    assert made.chosen is not None
    if lock is not None:
        write(made, lock)
    assert made.chosen is not None
    others = count(Path(options["catalog"]), made.chosen["model"]) - 1
    if why or others < TOLD:
        click.echo(made.explain(), err=True)
    else:
        click.echo(f"chosen of {others + 1} variants: --why gives the verdict on each", err=True)
    if form == "json":
        click.echo(dumps(public(made.chosen)))
    elif form == "csv":
        print_public([made.chosen], form)
    else:
        click.echo(front_table([made.chosen]))
    return 0


@main.command(short_help="Pick a variant of MODEL and let it continue a text.")
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help="Text to continue; -: standard input, as also where that is redirected.")
@click.option("--max-new-tokens", type=click.IntRange(1, 1 << 20), default=64, show_default=True, help="Tokens to add.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="Above 0: draw tokens; 0 is greedy.")
@click.option("--top-k", type=int, default=0, help="Draw from the k most likely tokens only.")
@click.option("--top-p", type=float, default=1.0, help="Draw from the most likely tokens that reach this share.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given again.")
@click.option(
    "--add-special-tokens/--no-add-special-tokens",
    default=True,
    show_default=True,
    help="Put before the prompt what the tokenizer puts before a text; a rendered chat has it already.",
)
@click.option("--variant", help="Open this variant instead of picking one.")
@click.option("--lock", type=PATH, help="Open what this lock file pins.")
@click.option("--fallback", is_flag=True, help="Where a variant's files are refused, open the next that meets the SLO.")
@slo_options
@catalog_option
@trust_options
def run(model: str, prompt: str | None, max_new_tokens: int, **options: Any) -> int:
    """Pick a variant of MODEL and let it continue a text, token by token.

    Without --prompt the text is what standard input holds; where that is a terminal or empty, the model begins itself.
    """
    from llmbuild.runtime.model import load

    opened = load(
        options["catalog"],
        model,
        options["slo"],
        options["objective"],
        options["target"],
        options["workload"],
        options["variant"],
        locked=options["lock"],
        trust_keys=options["trust"],
        allow_unsigned=options["allow_unsigned"],
        fallback=options["fallback"],
    )
    with opened:
        return _say(opened, _given(prompt), max_new_tokens, options)


def _given(prompt: str | None) -> str | None:
    """Return the prompt: as it is given, or else what standard input holds; None where there is none."""
    if prompt not in (None, "-"):
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        if prompt == "-":
            raise InputError("--prompt -: standard input is closed")
        return None
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: byte {error.start} cannot be read") from None
    return text if text or prompt else None


def _say(opened: Model, prompt: str | None, max_new_tokens: int, options: Mapping[str, Any]) -> int:
    """Print the prompt and what the model makes of it; what is to be known about it goes to stderr."""
    asked = {name: options[name] for name in ("temperature", "top_k", "top_p", "seed", "stop", "add_special_tokens")}
    answer = opened.generate(prompt, max_new_tokens, **asked)
    tpot = opened.row["tpot_s"]
    read = "never measured" if tpot is None else f"tpot {tpot:.3g} s"
    click.echo(f"variant {opened.row['variant'][:12]}, {read}", err=True)
    begun = f", {' '.join(answer.before)} put first" if answer.before else ""
    left = opened.tokenizer.behind if options["add_special_tokens"] else ()
    ends = f", the tokenizer's {' '.join(left)} at the end left out" if left else ""
    click.echo(f"prompt of {len(answer.prompt)} tokens{begun}{ends}", err=True)
    data(prompt or "")
    for piece in answer:
        data(piece)
    click.echo()
    if answer.finish_reason == "context":
        click.echo(f"the context of {opened.session.abi.context} tokens is full: the answer ends here", err=True)
    return 0


@main.command(short_help="Say everything about a VARIANT.")
@click.argument("variant")
@catalog_option
@click.option("--json", "form", cls=Shared, flag_value="json", help="JSON on stdout.")
def explain(variant: str, catalog: str, form: str | None) -> int:
    """Say everything about a VARIANT: what it is, how it was made, what was read, why it stands where it does."""
    from llmbuild import commands

    click.echo(commands.explain(variant, Path(catalog), form == "json"))
    return 0


@main.command()
@format_options
@click.argument("folder", default="recipes", type=PATH)
def recipes(folder: Path, form: str | None) -> int:
    """List the recipes of FOLDER and what each asks for."""
    from llmbuild.frontend.config import TAKEN
    from llmbuild.report import listings

    print_rows(listings.recipes(folder), form, listings.no_recipes(folder))
    click.echo(f"architectures that are taken: {TAKEN}", err=True)
    return 0


@main.command()
@click.option("-t", "--target", "targets", multiple=True, help="Only this target; may be given again.")
@click.option("--probe", "probed", is_flag=True, help="Generate code for a matrix-vector product to be sure.")
@click.option("--knobs", is_flag=True, help="List the knobs of the search space instead, and what is left out of it.")
@catalog_option
@format_options
def targets(form: str | None, knobs: bool, **options: Any) -> int:
    """List the targets, and whether this host can compile and run each."""
    from llmbuild import commands

    return print_rows(commands.knobs(options["targets"]) if knobs else commands.targets(options), form)


@main.command(short_help="Check this installation, this host and the catalog.")
@catalog_option
@format_options
def doctor(catalog: str, form: str | None) -> int:
    """Check this installation, this host and the catalog; say what to do about what is wrong."""
    from llmbuild import commands

    rows = commands.doctor(Path(catalog))
    print_rows(rows, form)
    return 1 if any(row["state"] == "wrong" for row in rows) else 0


for _command in cli_catalog.COMMANDS:
    main.add_command(_command)
