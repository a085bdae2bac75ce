"""llmbuild's import, and llama.cpp's conversion and quantization of the same weights: commands that are watched."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comparison import checkpoint, setup
from comparison.watched import STEP_S, Watched, watch
from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.spec.files.reader import read_recipe

HERE = Path(__file__).parent.parent
ROOT = HERE.parent.parent
CONVERTER = "convert_hf_to_gguf.py"
FORMATS = ("f16", "int8", "int4_g64", "f12_e4m7")
RECIPE = """\
name: {name}
model: {{huggingface: {folder}}}
workloads:
  - {{name: chat, prompt: 8, output: 8, context: {context}}}
objectives: [tpot_s, ttft_s, parameter_bytes]
knobs:
  kernel: [own]
  layout: [packed]
  weight_format: [{formats}]
  kv_dtype: [f16]
  opt_level: [O2]
"""


@dataclass(frozen=True)
class Imported:
    """One format of a build process: seconds since the process began, or since the format before it."""

    format: str
    first: bool
    wall_s: float
    cpu_s: float
    anonymous_bytes: int
    resident_bytes: int
    largest_process_bytes: int
    stored_bytes: int
    files: dict[str, str]


def weights_of(recipe_path: Path, place: Path, seed: int = 0) -> Path:
    """Return a folder with the weights of a recipe: its own, or random ones in bf16, written once under `place`.

    Raises:
        InputError: the model is not a folder, or of a kind whose weights are not written.
    """
    source = read_recipe(recipe_path).model
    config = Path(source.location) / "config.json"
    if not config.is_file():
        raise InputError(f"{recipe_path}: {source.location} is no model folder here")
    if not source.random_init:
        return Path(source.location)
    body = json.loads(config.read_text())
    folder = place / f"{recipe_path.stem}-{digest.short(digest.of({'config': body, 'seed': seed, 'type': 'bf16'}))}"
    try:
        return checkpoint.write(body, folder, seed)
    except ValueError as error:
        raise InputError(f"{recipe_path}: {error}") from None


def recipe_for(weights: Path, context: int, formats: Sequence[str], file: Path) -> Path:
    """Write the recipe that imports a folder of weights in these formats of llmbuild's own kernels."""
    name = file.stem
    body = RECIPE.format(name=name, folder=weights.absolute(), context=context, formats=", ".join(formats))
    file.write_text(body)
    return file


def imported(checkout: Path, recipe: Path, formats: Sequence[str], step_s: float = STEP_S) -> list[Imported]:
    """Import formats one after another in one process of a checkout's llmbuild, into a catalog that is thrown away.

    Raises:
        InputError: an import failed, or another llmbuild than the checkout's ran.
    """
    with TemporaryDirectory(prefix="llmbuild-bench-", dir=recipe.parent) as name:
        command = [sys.executable, str(HERE / "import_worker.py"), str(recipe), f"{name}/catalog", *formats]
        ran = watch(command, {"PYTHONPATH": str(checkout.absolute())}, step_s=step_s)
    told = [json.loads(line) for line in ran.output.splitlines()]
    if ran.code or len(told) != len(formats):
        raise InputError(f"{checkout}: the import ended with {ran.code}: {ran.last_line()}")
    found, begin, cpu = [], ran.begin, 0.0
    for each in told:
        if "failure" in each:
            raise InputError(f"{checkout}: {each['format']} is not imported: {each['failure']}")
        if Path(each["package"]).parent != checkout.absolute():
            raise InputError(f"{checkout}: {each['package']} ran in its place")
        peak = ran.peak(begin, each["end"])
        found.append(
            Imported(
                each["format"],
                begin == ran.begin,
                each["end"] - begin,
                each["cpu_s"] - cpu,
                peak.anonymous,
                peak.resident,
                ran.largest_bytes,
                each["bytes"],
                each["files"],
            )
        )
        begin, cpu = each["end"], each["cpu_s"]
    return found


def converter(place: setup.Environment, own: bool, say: setup.Say) -> Path:
    """Return the folder with llama.cpp's conversion: of the source package that llama-cpp-python is built from.

    Raises:
        InputError: it is not there, and not ours to fetch or not to be had.
    """
    tree = place.python.parent.parent / "llama.cpp"
    if (tree / CONVERTER).is_file():
        return tree
    if not own:
        raise InputError(f"{tree}: no {CONVERTER} here, which comes with the source package of llama-cpp-python")
    with source(place.python, _wanted, say) as found:
        tree.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(found), str(tree)], check=True)
    return tree


@contextmanager
def source(python: Path, wanted: Callable[[str], bool], say: setup.Say) -> Iterator[Path]:
    """Give llama.cpp's tree from the source package that llama-cpp-python is built from, fetched by this Python's pip.

    It has the files whose names in the package are `wanted`, and goes with the block.

    Raises:
        InputError: it is not to be had.
    """
    (pin,) = setup.pins(["llama-cpp-python"], setup.REQUIREMENTS.read_text()).values()
    say(f"fetching the source package of {pin}")
    with TemporaryDirectory(prefix="llmbuild-bench-") as name:
        options = ["--no-deps", "--no-binary", "llama-cpp-python", "--disable-pip-version-check", "-d", name]
        command = [str(python), "-m", "pip", "download", *options, pin]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(name).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise InputError(f"{pin}: no source package: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(name, [each for each in archive if wanted(each.name)], filter="data")
        (found,) = Path(name).glob("*/vendor/llama.cpp")
        yield found


def _wanted(name: str) -> bool:
    inside = name.partition("/vendor/llama.cpp/")[2]
    return inside == CONVERTER or inside.startswith(("conversion/", "gguf-py/gguf/"))


def converted(python: Path, tree: Path, weights: Path, out: Path, kind: str) -> Watched:
    """Convert a folder to GGUF by llama.cpp's conversion: a process of its own, as its users start it.

    Raises:
        InputError: it failed.
    """
    ran = watch([str(python), str(HERE / "llama_convert.py"), str(tree), str(weights), str(out), kind])
    if ran.code or not out.is_file():
        raise InputError(f"llama.cpp's conversion of {weights} ended with {ran.code}: {ran.last_line()}")
    return ran


def quantized(
    python: Path, source: Path, out: Path, kind: str, threads: int, importance: Path | None = None
) -> tuple[dict[str, Any], Watched]:
    """Quantize a GGUF file by llama.cpp: seconds of the call itself, without the start of the process around it.

    `importance` is an importance matrix, as `importance.write` writes it.

    Raises:
        InputError: it failed.
    """
    request = {"verb": "quantize", "source": str(source), "target": str(out), "format": kind, "threads": threads}
    request["importance"] = "" if importance is None else str(importance)
    ran = watch([str(python), str(setup.PEER_WORKER)], stdin=json.dumps(request) + "\n")
    told = json.loads(ran.output) if ran.output else {"refused": ran.last_line()}
    if "refused" in told:
        raise InputError(f"llama.cpp does not quantize {source} to {kind}: {told['refused']}")
    return told, ran
