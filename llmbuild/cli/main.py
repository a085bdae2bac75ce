"""The commands: parse, call one function, print. The only place where an error becomes an exit code."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

import llmbuild
from llmbuild.cli import build, catalog, convert, fleet, query, run, serve, streams
from llmbuild.cli.options import TEXT, before_command, check_taken, teaching
from llmbuild.errors import InputError, LlmbuildError
from llmbuild.system.extras import advice
from llmbuild.system.terminal import clear_line, guarded

INTERRUPTED = 130


class Group(click.Group):
    """Turns every error of llmbuild into one message and its exit code; a traceback is shown under `--debug` only."""

    debug = False

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command; its texts must be UTF-8, and it takes `--debug` as `llmbuild` itself does."""
        for parameter in cmd.params:
            if parameter.type is click.STRING:
                parameter.type = TEXT
        cmd.params.append(_debug_option())
        super().add_command(cmd, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command with guarded output."""
        with guarded():
            return self.main(*args, **kwargs)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command and exit with its code."""
        self.debug = False
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        kwargs["standalone_mode"] = False
        try:
            streams.prepare()
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
        except (streams.PipeClosed, BrokenPipeError):
            streams.quiet()
            code = streams.CLOSED_PIPE
        except OSError as error:
            if self.debug:
                raise
            told = streams.refusal(error)
            click.echo(f"error: {told}", err=True)
            code = InputError.exit_code
        except Exception as error:  # the one broad except: a bug of llmbuild must not look like the user's error
            if self.debug:
                raise
            click.echo(
                f"internal error: {type(error).__name__}: {error}\nrun again with --debug and report it", err=True
            )
            code = 1
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the command line; help may be printed to a closed pipe."""
        with streams.piped():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; its output may go to a closed pipe."""
        with streams.piped():
            try:
                return super().invoke(ctx)
            except ModuleNotFoundError as error:
                todo = advice(error)
                if self.debug or not todo:
                    raise
                raise InputError(f"`llmbuild {ctx.invoked_subcommand}` needs {error.name}: {todo}") from None


def _debug_option() -> click.Option:
    def note(_: click.Context, __: click.Parameter, value: bool) -> None:
        main.debug = main.debug or value

    return click.Option(["--debug"], is_flag=True, expose_value=False, callback=note, help="Show tracebacks.")


EPILOG = """\b
First:       llmbuild doctor; llmbuild recipes FOLDER; llmbuild build RECIPE
Then:        llmbuild query; llmbuild run MODEL
Exit codes:  0 done, 1 built nothing usable, 2 bad input,
             3 nothing meets the SLO, 130 interrupted, 141 output closed"""


@click.group(cls=Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(llmbuild.__version__, prog_name="llmbuild")
@before_command
@click.pass_context
def main(ctx: click.Context, /, **_: object) -> None:
    """Make for LLM binaries: build, measure and pick IREE variants of a model."""
    check_taken(ctx, main.commands[str(ctx.invoked_subcommand)])


main.params.append(_debug_option())

for _command in (
    *build.COMMANDS,
    *query.COMMANDS,
    *run.COMMANDS,
    *serve.COMMANDS,
    *convert.COMMANDS,
    *fleet.COMMANDS,
    *catalog.COMMANDS,
):
    main.add_command(_command)
