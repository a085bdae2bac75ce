"""From a launch line or a configuration file to a recipe and the flags of `llmbuild serve`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from llmbuild.errors import InputError
from llmbuild.serve.convert import sglang, vllm
from llmbuild.serve.convert.line import Given, Line, Program, flags_of_config, parse_line
from llmbuild.serve.convert.rules import Draft, Flag, Kind, Told, plain

CONTEXT = 2048
"""Positions of a recipe where the line names none: both servers take the model's own context, however long."""
PORTS = {"vllm": "8000", "sglang": "30000"}
"""Where each server listens if nothing is said."""

Config = Callable[[str], Mapping[str, object]]
"""Reads a configuration file."""


@dataclass(frozen=True)
class Became:
    """What became of one flag."""

    flag: str
    kind: Kind
    why: str


@dataclass(frozen=True)
class Converted:
    """A recipe, the command that serves what is built of it, and what became of every flag."""

    recipe: str
    serve: str
    flags: tuple[Became, ...]
    notes: tuple[str, ...] = ()
    """What was not said, and is otherwise here."""

    @property
    def refused(self) -> tuple[Became, ...]:
        """What was asked for and there is not."""
        return tuple(one for one in self.flags if one.kind == "refused")


@dataclass(frozen=True)
class _Server:
    program: Program
    flags: Mapping[str, Flag]
    prefixes: Mapping[str, Flag]
    variables: Mapping[str, Flag]

    def find(self, name: str) -> Flag | None:
        """Return what is known of a flag."""
        found = self.flags.get(name)
        return found or next((flag for begin, flag in self.prefixes.items() if name.startswith(begin)), None)


def _takes(flags: Mapping[str, Flag], prefixes: Mapping[str, Flag], name: str) -> int | None:
    found = flags.get(name) or next((flag for begin, flag in prefixes.items() if name.startswith(begin)), None)
    return 1 if name == "config" else None if found is None else found.takes


SERVERS: Mapping[str, _Server] = {
    "vllm": _Server(
        Program(
            "vllm",
            ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.api_server"),
            (("vllm", "serve"),),
            vllm.ALIASES,
            partial(_takes, vllm.FLAGS, vllm.PREFIXES),
            "model",
        ),
        vllm.FLAGS,
        vllm.PREFIXES,
        vllm.VARIABLES,
    ),
    "sglang": _Server(
        Program(
            "sglang",
            ("sglang.launch_server",),
            (("sglang", "serve"),),
            sglang.ALIASES,
            partial(_takes, sglang.FLAGS, sglang.PREFIXES),
            "model-path",
        ),
        sglang.FLAGS,
        sglang.PREFIXES,
        sglang.VARIABLES,
    ),
}


def convert_line(name: str, text: str, config: Config, memory_bytes: int | None = None) -> Converted:
    """Return what a launch line of `vllm` or `sglang` comes to; `--config` in it is read by `config`.

    Raises:
        InputError: it is no launch line, or names no model.
    """
    return _converted(name, parse_line(text, SERVERS[name].program), config, memory_bytes)


def convert_config(name: str, body: Mapping[str, object], memory_bytes: int | None = None) -> Converted:
    """Return what a configuration file of `vllm` or `sglang` comes to.

    Raises:
        InputError: it names no model.
    """
    aliases = {alias.lstrip("-"): flag for alias, flag in SERVERS[name].program.aliases.items()}
    flags = [Given(aliases.get(one.name, one.name), one.values, one.said) for one in flags_of_config(body)]
    return _converted(name, Line((), "", tuple(flags)), lambda file: {}, memory_bytes)


def _converted(name: str, line: Line, config: Config, memory_bytes: int | None) -> Converted:
    server, draft = SERVERS[name], Draft(memory_bytes)
    found: list[Became] = []
    if line.container:
        found.append(Became(line.container, "moot", "`llmbuild serve` needs no container"))
    for variable, value in line.variables:
        rule = server.variables.get(variable)
        told = rule.rule((value,), draft) if rule else Told("refused", "this llmbuild does not know the variable")
        found.append(Became(variable, told.kind, told.why))
    flags = _expanded(line.flags, config)
    last = {one.name: i for i, one in enumerate(flags)}
    draft.given = {one.name: one.values for one in flags}
    for i, given in enumerate(flags):
        again = last[given.name] != i
        told = Told("moot", "given again later") if again else _told(server, given, draft)
        shown = given.said or f"--{given.name}" if given.name in ("api-key", "hf-token") else given.text
        found.append(Became(shown, told.kind, told.why))
    if not draft.model:
        raise InputError(
            f"the launch line names no model: {server.program.name} takes it with --{server.program.positional}"
        )
    return Converted(_recipe(name, draft), _serve(name, draft), tuple(found), tuple(_notes(name, draft)))


def _notes(name: str, draft: Draft) -> list[str]:
    """Return what differs where nothing was said."""
    found = []
    if name == "vllm" and "--host" not in draft.serve:
        found.append("vllm listens on every address if none is named, llmbuild on the loopback: --host 0.0.0.0")
    if draft.context is None:
        found.append(f"no context is named: the recipe has {CONTEXT} positions, {name} those of the model")
    if "--scheduler" not in draft.serve:
        found.append(f"{name} cuts long prompts if nothing is said: `llmbuild serve --scheduler sarathi` does, too")
    return found


def _expanded(flags: tuple[Given, ...], config: Config) -> list[Given]:
    """Return flags with those of a configuration file before them: those of the line win."""
    files = [one.values[0] for one in flags if one.name == "config"]
    return [
        *(each for file in files for each in flags_of_config(config(file))),
        *(one for one in flags if one.name != "config"),
    ]


def _told(server: _Server, given: Given, draft: Draft) -> Told:
    flag, name, values = server.find(given.name), given.name, given.values
    if flag is None and name.startswith("no-") and (base := server.find(name[3:])) is not None and not base.takes:
        return Told("moot", "it is off")
    if flag is None:
        return Told("refused", f"this llmbuild does not know the {'flag' if given.said.startswith('-') else 'word'}")
    if (flag.takes == 1 and len(values) != 1) or (flag.takes < 0 and not values):
        return Told("refused", "it has one value" if flag.takes == 1 else "it has no value")
    if flag.takes == 0 and values and values[0].lower() not in ("true",):
        return Told("refused", "it takes no value")
    return flag.rule(values if flag.takes else (), draft)


def _name(draft: Draft) -> str:
    """Return the recipe's name: what clients call the model, in the letters of a name."""
    return plain(draft.name or draft.model)


def _recipe(server: str, draft: Draft) -> str:
    context = draft.context or CONTEXT
    prompt = min(128, max(1, context // 2))
    output = min(64, context - prompt)
    lines = [
        f"# From a launch line of {server}. Prompt and output lengths are a guess: put those of your requests.",
        *([] if draft.context else [f"# The line names no context; {CONTEXT} positions are a guess, too."]),
        f"name: {json.dumps(_name(draft))}",
        "model:",
        f"  {'gguf' if draft.gguf else 'huggingface'}: {json.dumps(draft.model)}",
        *(["  random_init: true"] if draft.random_init else []),
        "workloads:",
        f"  - {{name: serve, prompt: {prompt}, output: {output}, context: {context}}}",
        "objectives: [tpot_s, ttft_s, parameter_bytes]",
    ]
    if draft.knobs:
        lines += ["knobs:", *(f"  {knob}: [{value}]" for knob, value in sorted(draft.knobs.items()))]
    return "\n".join(lines) + "\n"


def _serve(server: str, draft: Draft) -> str:
    options = dict(draft.serve)
    options.setdefault("--port", PORTS[server])
    words = ["llmbuild", "serve", _name(draft), *(word for pair in sorted(options.items()) for word in pair)]
    return shlex.join(words)
