"""The command that reads launch lines of other servers: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmbuild.cli.options import PATH
from llmbuild.errors import InputError, sentence
from llmbuild.system.strict_json import dumps

SERVERS = ("sglang", "vllm")
"""`serve/convert/convert.py` has them; a test holds the two against each other."""
REFUSED = 2
"""The exit code where a flag asks for what there is not."""
_FILES = (".yaml", ".yml", ".json")


@click.command(short_help="Make a recipe and serve flags of another server's launch line.")
@click.argument("server", type=click.Choice(SERVERS))
@click.argument("line", metavar="'LAUNCH LINE'|FILE")
@click.option("-o", "--output", type=PATH, metavar="RECIPE", help="Write the recipe to this file.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def convert(server: str, line: str, output: Path | None, as_json: bool) -> int:
    """Make a recipe and `llmbuild serve` flags of a launch line, or of a configuration file in YAML or JSON.

    What becomes of each flag is told on standard error: mapped, moot and why, or refused. The exit code is 2 if one was
    refused.
    """
    from llmbuild.digest import plain
    from llmbuild.runtime import host
    from llmbuild.serve.convert.convert import convert_config, convert_line

    memory = host.available_memory_bytes()
    file = Path(line)
    if line.endswith(_FILES) and " " not in line.strip():
        made = convert_config(server, _config(file), memory)
    else:
        made = convert_line(server, line, lambda name: _config(Path(name)), memory)
    if output is not None:
        try:
            with open(output, "x") as written:
                written.write(made.recipe)
        except FileExistsError:
            raise InputError(f"{output}: is there already: name another file") from None
        except OSError as error:
            raise InputError(sentence(error)) from None
    if as_json:
        click.echo(dumps({**plain(made), "server": server}))
    else:
        width = max(len(one.flag) for one in made.flags)
        for one in made.flags:
            click.echo(f"{one.kind:<8} {one.flag:<{min(width, 40)}}  {one.why}", err=True)
        for note in made.notes:
            click.echo(f"note     {note}", err=True)
        click.echo(made.serve if output is not None else f"{made.recipe}\n# {made.serve}")
    if made.refused:
        click.echo(
            f"{len(made.refused)} of {len(made.flags)} flags are refused: what is made goes without them", err=True
        )
        return REFUSED
    return 0


def _config(file: Path) -> dict[str, Any]:
    """Return what a configuration file has.

    Raises:
        InputError: it cannot be read, or has no flags.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        body = YAML(typ="safe").load(file.read_text())
    except OSError as error:
        raise InputError(sentence(error)) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(body, dict):
        raise InputError(f"{file}: no configuration: it must have a flag on each line, such as `port: 8000`")
    return body


COMMANDS = (convert,)
