"""llama.cpp's own HTTP server: built from the source package that the peers' environment pins."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from comparison import conversion, setup
from llmbuild.errors import InputError
from llmbuild.runtime import host

NAME = "llama-server"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
"""What CMake is told: code for this CPU, one file, and neither TLS nor the web pages, which are fetched or need npm."""

TILES = "ggml/src/ggml-cpu/amx/mmq.cpp"
"""Where llama.cpp tells a CPU with AMX the shapes of its tiles."""
_TELLS = "_tile_loadconfig(&tc);"
_KEPT = 'asm volatile("" : : "r"(&tc) : "memory");'
"""GCC 12 takes the shapes to be 8 of their 64 bytes long, and may drop the rest: the products then end by SIGILL."""

_LEFT_OUT = ("docs/", "media/", "models/", "gguf-py/", "tests/", "tools/ui/src/", "tools/ui/static/")
"""Folders of llama.cpp's tree that the server is not made of; others of such names, deeper in it, have its sources."""


def server(folder: Path, python: Path, own: bool, say: setup.Say) -> Path:
    """Return the server in a folder; one of our own is built there, which takes some ten minutes.

    Raises:
        InputError: it is not there, and not ours to build or not to be built.
    """
    made = folder / NAME / "bin" / NAME
    if made.is_file():
        return made
    if not own:
        raise InputError(f"{made}: no {NAME} here: without --environment it is built, or --server names one")
    if shutil.which("cmake") is None:
        raise InputError(f"{NAME} is built by CMake, which is not there: pip install cmake")
    place = made.parent.parent
    tree = place / "source"
    if not tree.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        with conversion.source(python, wanted, say) as found:
            partial = tree.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(found, partial)
            mend(partial)
            partial.rename(tree)
    say(f"building {NAME} in {place}: some ten minutes on two cores")
    build(tree, place)
    shutil.rmtree(tree)
    return made


def wanted(name: str) -> bool:
    """Return whether a file of the source package is one that the server is built from."""
    inside = name.partition("/vendor/llama.cpp/")[2]
    return bool(inside) and not inside.startswith(_LEFT_OUT)


def mend(tree: Path) -> None:
    """Let the compiler keep the shapes of AMX's tiles (GCC's bug 114098), so that AMX need not be left out.

    Raises:
        InputError: they are told elsewhere in this llama.cpp.
    """
    file = tree / TILES
    text = file.read_text() if file.is_file() else ""
    if _TELLS not in text:
        raise InputError(f"{file}: no {_TELLS} here: this llama.cpp is another than the one that is known")
    if _KEPT not in text:
        file.write_text(text.replace(_TELLS, f"{_KEPT}\n    {_TELLS}"))


def build(tree: Path, place: Path) -> None:
    """Build the server of a tree in a folder, from where an earlier attempt ended; what is printed is in `build.log`.

    Raises:
        InputError: CMake fails, or the tree does not know one of `OPTIONS`.
    """
    log = place / "build.log"
    told = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    _ran(["cmake", "-S", str(tree), "-B", str(place), *told], log)
    if unknown := unused(log.read_text()):
        raise InputError(f"{tree}: this llama.cpp has no option {', '.join(unknown)}: see {log}")
    _ran(["cmake", "--build", str(place), "--target", NAME, "--parallel", str(host.cores())], log)


def unused(log: str) -> list[str]:
    """Return the options that a project does not know: CMake only warns of them."""
    found = re.search(
        r"Manually-specified variables were not used by the project:\s*\n(.*?)(?:\n--|\Z)", log, re.DOTALL
    )
    return [name for name in (found[1].split() if found else ()) if name in OPTIONS]


def _ran(command: Sequence[str], log: Path) -> None:
    with log.open("a") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise InputError(f"`{' '.join(command)}` ended with {code}: see {log}")


def command(made: Path, gguf: Path, sequences: int, context: int, threads: int) -> list[str]:
    """Return the command that serves a file on a free port, with f16 memory for so many sequences of `context` tokens.

    Prompts of requests that ended are kept in no other memory than these.
    """
    words = ["--model", str(gguf), "--parallel", str(sequences), "--ctx-size", str(sequences * context)]
    words += ["--threads", str(threads), "--threads-batch", str(threads), "--cache-ram", "0"]
    return [str(made), *words, "--host", "127.0.0.1", "--port", "0"]
