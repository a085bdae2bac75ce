"""What commands that answer over HTTP share: where they listen, whom they answer, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmbuild.cli.options import PATH

if TYPE_CHECKING:
    from llmbuild.serve.api.keys import Keys
    from llmbuild.serve.api.server import Place

CUT_OFF = 130
"""The exit code where answers were cut off at the end."""
F = TypeVar("F", bound=Callable[..., object])
_OPTIONS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for any."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free."),
    click.option(
        "--api-keys", type=PATH, metavar="FILE", help="Take only requests with a key of this file, one a line."
    ),
)


def listen_options(command: F) -> F:
    """Add where a command listens, and the keys that it takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def listens(options: Mapping[str, Any], drain_s: float) -> tuple[Place, Keys]:
    """Return where a command listens and the keys that it takes; warn where anybody is answered.

    Raises:
        InputError: the file of keys cannot be read, or has none.
    """
    from llmbuild.serve.api.keys import Keys
    from llmbuild.serve.api.server import Place

    keys = Keys() if options["api_keys"] is None else Keys.read(options["api_keys"])
    place = Place(options["host"], options["port"], drain_s)
    if not place.local and not keys.digests:
        click.echo(f"warning: anybody who reaches {place.host} is answered: --api-keys FILE asks for a key", err=True)
    return place, keys


def ended(done: bool) -> int:
    """Tell how a server ended, and return its exit code."""
    click.echo("every answer was finished" if done else "answers were cut off", err=True)
    return 0 if done else CUT_OFF
