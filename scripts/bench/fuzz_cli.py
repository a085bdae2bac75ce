"""Run unusual command lines: repeated options, invalid values, paths that are not files.

python scripts/bench/fuzz_cli.py [--cases 2000] [--seed 0] [--only NUMBER] [--json]

Each case calls the command line's entry point in this process, in its own folder, without a network. It must end
within seconds with an exit code of the contract and at most one message on stderr; JSON and CSV output must be valid.
Long work is left out: a valid recipe is only planned. Anything else is a fault: a traceback, an internal error, a
hang, a file written elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from fuzz import Hang, _late
from safetensors.numpy import save_file
from synthetic import Made, fill

from llmbuild.catalog.exchange.publish import publish
from llmbuild.catalog.exchange.signing import make_keys
from llmbuild.catalog.writer import Catalog
from llmbuild.cli.main import main as command_line
from llmbuild.report.rows import table
from llmbuild.runtime import host, lock
from llmbuild.runtime.model import pick

HANG_S = 30
MEMORY = 6 << 30
"""Bytes that the address space may grow by: a file without end is not read into memory."""
CODES = {0, 1, 2, 3, 130, 141}
SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, **SHAPE}
WEIGHTS, LAYER = "model.safetensors", "model.layers.0."
TENSORS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (64, 16)),
    **{f"{LAYER}self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
    **dict.fromkeys((f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"), (24, 16)),
    f"{LAYER}mlp.down_proj.weight": (16, 24),
    **{f"model.{name}.weight": (16,) for name in ("norm", "layers.0.input_layernorm")},
    f"{LAYER}post_attention_layernorm.weight": (16,),
}
"""A sound Llama of one layer."""
RECIPE = "model: {huggingface: model}\nworkloads: [{name: short, prompt: 8, output: 8}]\n"

NUMBERS = "0 -1 1 2 64 65 9999999999999999999999 -0 nan inf -inf 1e999 1e-999 0x10 ١ ½ 1_000 +1 1. .5 3.0 1e3".split()
TEXTS = [
    *("", " ", "x", "m", "é", "日本", "\x1b[2J\x07", "a\nb", "\t", "'", '"', "`id`", "$(id)", "%s%n", "{}", "x" * 5000),
    *("../../x", "-", "--", "-x", "\udcff", "\u202e", "😀", "=", "a=b", "a=", "=b", "\\", "*", "?", "#", "\u2028"),
]
SLOS = [
    *(
        "tpot_s<=0.02",
        "tpot_s<=",
        "<=1",
        "tpot_s",
        "tpot_s<=nan",
        "tpot_s<=inf",
        "tpot_s<=1e999",
        "speed<=1",
        "tpot_s>=1",
    ),
    *("tpot_s<=-1", "tpot_s<0.02", "tpot_s = 1", "tpot_s<=0,02", "quality_top1>=101%", " tpot_s <= 1 ", "tpot_s<=1<=2"),
]
PINS = [
    "opt_level=O2",
    "opt_level=O9",
    "opt_level",
    "=O2",
    "opt_level=",
    "a=b=c",
    "weight_format=int4_g64",
    "kernel=own",
]
SPECIAL = {
    "slo": SLOS,
    "pinned": PINS,
    "objective": ["tpot_s", "tpot", "", "quality_top1", "variant", "1; DROP TABLE variant"],
    "budget": ["20m", "0", "-1s", "nan", "1e999s", "9" * 400, "1h30m", "", " 5 s "],
    "size": ["2GB", "-1", "nan", "1e999", "5XB", "", "0", "1 kB", "9" * 400, "inf"],
    "cpu": ["haswell", "zen4", "neoverse_v2", "z80", "", "a64fx", "HASWELL"],
    "targets": ["host", "x86-64-v3", "zen4", "nope", "", "h200", "../zen4", "recipe.yaml", "target.yaml"],
    "target": ["host", "nope", "", "x86-64-v3", "' OR 1=1 --"],
    "on": [
        "ssh://127.0.0.1:1",
        "ssh://",
        "ssh://-oProxyCommand=x",
        "http://x",
        "",
        "ssh://a b",
        "ssh://h:99999",
        "local",
    ],
    "workload": ["short", "nope", ""],
    "model": ["m", "nope", "", "' OR 1=1 --", "%", "\udcff"],
    "models": ["m", "nope", ""],
}
PLACES = [
    *(
        "none",
        "folder",
        "file.txt",
        "fifo",
        "dangling",
        "loop",
        "socket",
        "endless",
        "full",
        "seed",
        "seed",
        "published",
    ),
    *("a b/recipe.yaml", "a?b/recipe.yaml", "a#b/recipe.yaml", "a%20b/recipe.yaml", "a\nb/recipe.yaml", "\udcff.yaml"),
    *("recipe.yaml", "bad.yaml", "target.yaml", "binary.yaml", "model", "broken", "pointer", "keys.pub", "keys.key"),
    *(
        "seed.lock",
        "a?b/seed",
        "a#b/seed",
        "a%20b/seed",
        "a\nb/seed",
        "x" * 300,
        "a/" * 300 + "b",
        "~",
        "~nobody/x",
        ".",
    ),
    *("file.txt/below", "seed/catalog.sqlite", "..//work/seed", "seed/", "", "file:seed", "file://seed", "memory://x"),
    *(
        "oci://",
        "oci://x",
        "oci://127.0.0.1:1/a:b",
        "oci://127.0.0.1:1/Team/A:b",
        "oci://h/a:b@sha256:00",
        "oci://h/a b",
    ),
    *(
        "s3://",
        "s3:///x",
        "s3://b/k",
        "gs://",
        "http://[",
        "http://127.0.0.1:1/x",
        "ftp://x",
        "weird://x",
        "://",
        "a:b",
    ),
    *("postgresql://", "postgresql://[", "postgresql://127.0.0.1:1/x", "postgres://127.0.0.1:1/x", "sqlite:///x"),
]
VARIABLES: dict[str, list[str]] = {
    "LLMBUILD_CATALOG": ["seed", "", "none", "fifo", "postgresql://[", "a?b/seed", "\udcff"],
    "LLMBUILD_TRUST": ["", ":", "keys.pub", "keys.pub:", "none", "folder", "fifo", "\udcff", "keys.pub:keys.pub"],
    "LLMBUILD_BLOBS": ["", "file.txt", "none"],
    "LLMBUILD_ENERGY_ESTIMATE": ["", "20:65", "20", "nan:1", "65:20", "a:b", "1e999:2e999"],
    "COLUMNS": ["", "0", "-5", "1", "100000", "x"],
    "LINES": ["x"],
    "TERM": ["", "dumb", "\udcff"],
    "NO_COLOR": ["1"],
    "TMPDIR": ["none", "file.txt", "a?b"],
    "HOME": ["", "none", "file.txt"],
    "PATH": ["", "none"],
    "LANG": ["C", "xx_YY", ""],
    "SOURCE_DATE_EPOCH": ["x"],
}


# --- what there is to meet ---------------------------------------------------------------------------------------


def template(folder: Path) -> None:
    """Write what is the same for every case: catalogs, a publication, recipes, a model, keys."""
    fill(folder / "seed", [Made("default", "dominated", default=True), Made("fast"), Made("small", tpot_s=0.02)])
    catalog = Catalog(folder / "seed")
    publish(catalog, (), str(folder / "published"), None)
    catalog.close()
    lock.write(pick(folder / "seed", "m"), folder / "seed.lock")
    make_keys(folder / "keys")
    for name in ("model", "broken"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIG if name == "model" else {"model_type": "gpt2"}))
        save_file({key: np.zeros(shape, np.float32) for key, shape in TENSORS.items()}, folder / name / WEIGHTS)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "bad.yaml").write_text(RECIPE + "model: {}\nspeed: 9\n")
    (folder / "pointer").mkdir()
    (folder / "pointer/latest.json").write_text('{"manifest": NaN}')
    (folder / "target.yaml").write_text(f"backend: llvm-cpu\narch: {host.architecture()}\ncpu: generic\n")
    (folder / "binary.yaml").write_bytes(bytes(range(256)) * 8)
    (folder / "file.txt").write_text("text\n")
    (folder / "folder").mkdir()
    for odd in ("a b", "a?b", "a#b", "a%20b", "a\nb"):
        (folder / odd).mkdir()
        (folder / odd / "recipe.yaml").write_text(RECIPE.replace("model:", "model:").replace(": model}", ": ../model}"))
        shutil.copytree(folder / "seed", folder / odd / "seed")
    (folder / "\udcff.yaml").write_text(RECIPE)


def copy_named(template: Path, work: Path, text: str) -> None:
    """Make a fresh folder with those parts of the template that a text may mean."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for path in template.iterdir():
        if path.name == "model" or path.name in text or (path.suffix and path.stem in text):
            shutil.copytree(path, work / path.name) if path.is_dir() else shutil.copy(path, work)


def special(folder: Path) -> None:
    """Make what cannot be copied: pipes, links to nothing and to themselves, devices."""
    os.mkfifo(folder / "fifo")
    for name, to in (("dangling", "nowhere"), ("loop", "loop"), ("endless", "/dev/zero"), ("full", "/dev/full")):
        (folder / name).symlink_to(to)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind("socket")


# --- command lines -----------------------------------------------------------------------------------------------


class Lines:
    """Draws command lines from what the commands themselves say they take."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.commands = sorted(command_line.commands)

    def value(self, parameter: click.Parameter) -> str:
        """Return a value for a parameter, most often one of its kind."""
        kinds = [SPECIAL.get(str(parameter.name)), TEXTS, NUMBERS, PLACES]
        if isinstance(parameter.type, click.Choice):
            kinds[0] = [str(choice) for choice in parameter.type.choices]
        elif isinstance(parameter.type, (click.IntRange, click.FloatRange)) or parameter.type.name in (
            "integer",
            "float",
        ):
            kinds[0] = NUMBERS
        chosen = self.random.choices(kinds, [6, 1, 1, 2])[0] or PLACES
        return self.random.choice(chosen)

    def option(self, option: click.Option) -> list[str]:
        """Return an option as it stands on the command line."""
        name = self.random.choice(option.opts)
        if option.is_flag:
            return [name]
        value = self.value(option)
        joined = name.startswith("--") and self.random.random() < 0.3
        return [f"{name}={value}"] if joined else [name, value]

    def draw(self) -> list[str]:
        """Return one command line."""
        roll = self.random.random
        if roll() < 0.03:
            return self.random.choices([*TEXTS, *self.commands, "-h", "--version", "-C", "--json"], k=3)
        command = command_line.commands[self.random.choice(self.commands)]
        options = [p for p in command.params if isinstance(p, click.Option)]
        words: list[str] = []
        for _ in range(self.random.choice([0, 1, 1, 2, 2, 3, 5])):
            words += self.option(self.random.choice(options))
        for argument in (p for p in command.params if isinstance(p, click.Argument)):
            times = 1 if argument.nargs == 1 else self.random.choice([1, 1, 2, 3])
            times = self.random.choices([times, 0, times + 1], [12, 1, 1])[0]
            words += [self._argument(argument) for _ in range(times)]
        if roll() < 0.6 and any(p.name == "catalog" for p in command.params):
            words += ["-C", self.random.choice(["seed", "seed", "published", "new", self.random.choice(PLACES)])]
        if roll() < 0.05:
            words.insert(self.random.randrange(len(words) + 1), self.random.choice(["--", "-", "-z", "--zz", *TEXTS]))
        before = self.option(self.random.choice(command_line.params)) if roll() < 0.1 else []  # type: ignore[arg-type]
        planned = ["-n"] if command.name in ("build", "compile") else []  # a sound recipe is not built
        probed = ["-t", "x86-64-v3"] if "--probe" in words else []
        line = [*before, str(command.name), *planned, *probed, *words]
        return [word for word in line if word != "--debug"]

    def _argument(self, argument: click.Argument) -> str:
        if argument.name == "variant" and self.random.random() < 0.7:
            return self.random.choice(["", "0", "a", "ffff", "1" * 64, *"0123456789abcdef"])
        return self.random.choice(PLACES) if self.random.random() < 0.8 else self.value(argument)

    def environment(self) -> dict[str, str]:
        """Return variables to set, most often none."""
        if self.random.random() < 0.6:
            return {}
        names = self.random.choices(sorted(VARIABLES), k=self.random.choice([1, 1, 2]))
        return {name: self.random.choice(VARIABLES[name]) for name in names}


# --- one case ----------------------------------------------------------------------------------------------------


def _unreachable(*_: Any, **__: Any) -> Any:
    raise OSError(101, "Network is unreachable")


@contextlib.contextmanager
def set_up(work: Path, variables: dict[str, str]) -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Stand in a folder with variables set; yield what takes stdout and stderr."""
    before, held, streams = Path.cwd(), dict(os.environ), (sys.stdout, sys.stderr)
    out, err = io.BytesIO(), io.BytesIO()
    os.chdir(work)
    special(work)
    os.environ.update({"HOME": str(work), "HF_HUB_OFFLINE": "1", "AWS_EC2_METADATA_DISABLED": "true", **variables})
    sys.stdout = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(err, encoding="utf-8", errors="backslashreplace", write_through=True)
    signal.alarm(HANG_S)
    try:
        yield out, err
    finally:
        signal.alarm(0)
        for stream in (sys.stdout, sys.stderr):
            stream.detach()
        sys.stdout, sys.stderr = streams
        os.environ.clear()
        os.environ.update(held)
        os.chdir(before)


def case(work: Path, words: list[str], variables: dict[str, str]) -> tuple[int | str, str, str]:
    """Run a command line; return its exit code, or what went wrong, with stdout and stderr."""
    came: int | str = 0
    with set_up(work, variables) as (out, err):
        try:
            command_line(args=list(words), prog_name="llmbuild")
        except SystemExit as ended:
            came = ended.code if isinstance(ended.code, int) else 0
        except Hang:
            came = "hung"
        except BaseException as error:  # noqa: BLE001 - this is what is looked for
            came = f"{type(error).__name__}: {error}"
    return came, out.getvalue().decode(errors="replace"), err.getvalue().decode(errors="replace")


def faults_of(words: list[str], came: int | str, out: str, err: str) -> list[str]:
    """Return how the end of a case breaks the contract."""
    found = [] if came in CODES else [f"ended with {came}"]
    found += [f"says {text!r}" for text in ("Traceback", "internal error") if text in err or text in out]
    several = {"-k", "--keep-going", "build", "compile", "profile"}  # what came before the refused recipe is shown
    if came == 2 and out and not several.intersection(words):
        found.append("refused with something on stdout")
    if came in (2, 3) and not err.strip():
        found.append("refused without a word")
    errors = [line for line in err.splitlines() if line.lower().startswith(("error: ", "internal error: "))]
    if len(errors) > 1 and "-k" not in words and "--keep-going" not in words:
        found.append("several errors")
    if any((c < " " and c not in "\n\t\r") or c == "\x7f" for c in out + err):
        found.append("control characters are printed")
    return found + _unreadable(words, out)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unreadable(words: list[str], out: str) -> list[str]:
    if not out or any(word in words for word in ("-h", "--help", "--version")):
        return []
    try:
        if "--json" in words:
            json.loads(out, parse_constant=_refuse)
        elif "--csv" in words and len({len(row) for row in csv.reader(io.StringIO(out), strict=True)}) != 1:
            return ["CSV with rows of several lengths"]
    except (ValueError, csv.Error) as error:
        return [f"stdout is not what was asked for: {error}"]
    return []


def run(folder: Path, cases: int, seed: int, only: int | None = None) -> dict[str, Any]:
    """Run `cases` command lines and return how they ended, and what went wrong."""
    template(folder / "template")
    socket.socket.connect = _unreachable  # type: ignore[method-assign]
    socket.getaddrinfo = _unreachable
    signal.signal(signal.SIGALRM, _late)
    with contextlib.suppress(OSError, ValueError):
        grown = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (grown, resource.getrlimit(resource.RLIMIT_AS)[1]))
    lines, ends, faults = Lines(seed), Counter[str](), []
    for number in range(cases):
        words, variables = lines.draw(), lines.environment()
        if only is not None and number != only:
            continue
        work = folder / "work"
        copy_named(folder / "template", work, " ".join([*words, *variables.values()]))
        came, out, err = case(work, words, variables)
        ends[str(came)] += 1
        told = faults_of(words, came, out, err)
        outside = sorted(p.name for p in folder.iterdir() if p.name not in ("template", "work"))
        told += [f"wrote {name} outside" for name in outside]
        if told or only is not None:
            faults.append(
                {"case": number, "words": words, "variables": variables, "faults": told, "stderr": err[-600:]}
            )
            print(ascii(faults[-1]), file=sys.stderr, flush=True)
        for name in outside:
            (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name)
    return {"cases": cases, "ended": dict(sorted(ends.items())), "faults": faults}


def main() -> None:
    """Print what came of it; exit 1 on any fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="Run this case alone, and show what it says.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        found = run(Path(name), arguments.cases, arguments.seed, arguments.only)
    if arguments.json:
        print(json.dumps({"machine": host.machine().describe(), **found}))
    else:
        shown = [[key, str(value)] for key, value in found.items() if key != "faults"]
        shown += [["fault", ascii(fault)] for fault in found["faults"]]
        print(table(["what", "came to"], shown, left=(0, 1)))
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
