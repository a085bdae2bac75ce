"""Kill builds, publications and collections at random moments, and let many processes write one catalog.

python scripts/bench/endurance.py kill [--tiny | --recipe recipes/pystdlib.yaml] [--moments 50] [--json]
python scripts/bench/endurance.py write [--tiny] [--processes 8] [--seconds 60] [--json]

`kill` checks after each kill -9: the database's integrity, every digest, that no finished item was lost, and that
publications can be pulled completely, and at the end that the next run of each command completes. One of the
processes records synthetic variants through the writer; with --recipe, or --tiny for a shape that compiles in seconds,
real builds are killed too. `replaced` counts items for which a rebuild wrote other bytes or another variant. `write`
lets processes record synthetic variants; with --tiny one in four compiles real ones, each with other flags.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from synthetic import Made, fill

from llmbuild.catalog import verify
from llmbuild.catalog.schema import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import CatalogError
from llmbuild.report.rows import table
from llmbuild.runtime import host

MAIN = [sys.executable, "-m", "llmbuild"]
TINY = """\
name: tiny
model: {huggingface: ./model, random_init: true}
workloads:
  - {name: short, prompt: 4, output: 4, context: 16}
objectives: [tpot_s, parameter_bytes]
budget: {trials: 2, time: 20m}
knobs: {opt_level: [O1, O2, O3], layout: [row_major], kernel: [compiler], weight_format: [f32, f16]}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SPAN_S = {"build": 12.0, "write": 0.8, "publish": 1.5, "gc": 1.2}
"""A kill comes at a moment drawn from this long after the start."""


def write(folder: Path, name: str, seconds: float, front: bool = True) -> int:
    """Record synthetic variants, one whole model after another, for some time; return how many models."""
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        status = "pareto" if front else "dominated"
        one = f"{name}-{count}"  # named apart, so that no compile has the key of another
        made = [Made(f"default {one}", default=True), Made(f"more {one}", status, parameters=one.encode())]
        fill(folder, made, one)
        count += 1
    return count


def finished(folder: Path) -> dict[tuple[str, ...], str]:
    """Return what is finished in a catalog, and what it names: trials, readings, imports, compiles."""
    if not (folder / FILE).is_file():
        return {}
    connection = sqlite3.connect(folder / FILE)
    queries = (
        "SELECT 'trial', scope || point, variant FROM trial",
        "SELECT 'reading', key, artifact FROM measurement",
        "SELECT 'import', key, program FROM import",
        "SELECT 'compile', key, artifact FROM compile",
    )
    try:
        return {row[:2]: row[2] for query in queries for row in connection.execute(query)}
    except sqlite3.OperationalError:  # killed before the tables were there
        return {}
    finally:
        connection.close()


def tiny(folder: Path) -> Path:
    """Write the recipe of a shape that compiles in seconds."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    return recipe


def wrongs(folder: Path) -> list[str]:
    """Return what is wrong with a catalog: integrity, references, digests."""
    if not (folder / FILE).is_file():
        return []
    catalog = Catalog(folder)
    try:
        return [f"{f.problem} {f.what}" for f in verify.verify(catalog) if f.wrong]
    finally:
        catalog.close()


def unpublished(place: Path, scratch: Path) -> list[str]:
    """Return why a publication that has a pointer cannot be pulled whole; empty where it can, or there is none yet."""
    if not (place / "latest.json").is_file():
        return []
    with TemporaryDirectory(dir=scratch) as name:
        done = subprocess.run(
            [*MAIN, "pull", str(place), "--all", "-C", f"{name}/got"], capture_output=True, text=True, check=False
        )
    return [] if done.returncode == 0 else [done.stderr.strip()]


def commands(folder: Path, recipe: Path | None) -> dict[str, list[str]]:
    """Return what is killed, by name."""
    catalog = str(folder / "catalog")
    writer = [sys.executable, __file__, "_write", catalog]
    build = {"build": [*MAIN, "build", str(recipe), "-C", catalog]} if recipe else {}
    publish = [*MAIN, "publish", str(folder / "published"), "-C", catalog]
    return {"write": writer, **build, "publish": publish, "gc": [*MAIN, "gc", "-C", catalog]}


def kill(folder: Path, recipe: Path | None, moments: int, seed: int = 0) -> dict[str, Any]:
    """Kill each command at random moments and return what came of it."""
    draw, told, kills = random.Random(seed), [], Counter[str]()
    runs = commands(folder, recipe)
    begun = subprocess.run([*runs["write"], "1"], capture_output=True, check=False)
    assert begun.returncode == 0, begun.stderr.decode()
    lost, replaced = 0, Counter[str]()
    for number in range(moments):
        name = draw.choice(list(runs))
        before = finished(folder / "catalog")
        work = {"build": ["-B"] if number % 3 == 2 else ["--trials", str(4 + number)], "write": ["30", str(number)]}
        more = work.get(name, [])
        child = subprocess.Popen([*runs[name], *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.0, SPAN_S[name]))
        child.send_signal(signal.SIGKILL)
        kills[name if child.wait() == -signal.SIGKILL else f"{name}, had ended"] += 1
        after = finished(folder / "catalog")
        lost += len(before.keys() - after.keys())
        told += [f"after killing {name}: lost {key[0]} {key[1][:12]}" for key in before.keys() - after.keys()]
        changed = [key[0] for key in before.keys() & after.keys() if before[key] != after[key]]
        replaced.update(f"{kind} by {' '.join([name, *more[:1]])}" for kind in changed)
        found = [*wrongs(folder / "catalog"), *unpublished(folder / "published", folder)]
        told += [f"after killing {name}: {problem}" for problem in found]
    endings = {}
    for name, line in runs.items():
        more = ["1", "end"] if name == "write" else []
        endings[name] = subprocess.run([*line, *more], capture_output=True, check=False).returncode
    told += [f"at the end: {problem}" for problem in wrongs(folder / "catalog")]
    return {"kills": dict(kills), "problems": told, "lost": lost, "replaced": dict(replaced), "endings": endings}


def compiles(folder: Path, recipe: Path, name: str, seconds: float) -> int:
    """Compile one choice of flags after another for some time; return how many."""
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        pins = [f"distribution_size={(32, 64, 128)[count % 3]}", f"vector_width={(16, 32)[count // 3 % 2]}"]
        line = ["compile", str(recipe), "--trials", "2", "-C", str(folder), *(a for p in pins for a in ("--set", p))]
        done = subprocess.run([*MAIN, *line, "--json"], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr.strip()}")
        count += len(json.loads(done.stdout))
    return count


def many(folder: Path, processes: int, seconds: float, recipe: Path | None = None) -> dict[str, Any]:
    """Let processes write one catalog at once; return how much was written, lost, and what anyone was told."""
    line = [sys.executable, __file__, "_write", str(folder / "catalog"), str(seconds)]
    real = {f"p{n}" for n in range(processes) if recipe and n % 4 == 0}
    lines = {f"p{n}": [*line, f"p{n}", *([str(recipe)] if f"p{n}" in real else [])] for n in range(processes)}
    children = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in lines.values()
    ]
    told = [child.communicate() for child in children]
    written = {name: int(out or 0) for name, (out, _) in zip(lines, told, strict=True) if name not in real}
    connection = sqlite3.connect(folder / "catalog" / FILE)
    models = [row[0].rsplit("-", 1)[0] for row in connection.execute("SELECT DISTINCT model FROM standing")]
    there = Counter(name for name in models if name in written)
    connection.close()
    return {
        "processes": processes,
        "seconds": seconds,
        "models_written": sum(written.values()),
        "compiles": sum(int(out or 0) for name, (out, _) in zip(lines, told, strict=True) if name in real),
        "lost_updates": sum(written.values()) - sum(there.values()),
        "errors": [err.strip()[-300:] for _, err in told if err.strip()],
        "problems": wrongs(folder / "catalog"),
    }


def main() -> None:
    """Run one of the two and print what came of it; exit 1 on any problem."""
    if sys.argv[1:2] == ["_write"]:
        folder, seconds, name = Path(sys.argv[2]), float(sys.argv[3]), (sys.argv[4:] or ["w"])[0]
        try:
            recipe = sys.argv[5:6]
            print(compiles(folder, Path(recipe[0]), name, seconds) if recipe else write(folder, name, seconds))
        except CatalogError as error:
            sys.exit(str(error))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "write"])
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--tiny", action="store_true", help="real builds of a tiny shape with random weights")
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        recipe = tiny(Path(name) / "tiny") if arguments.tiny else arguments.recipe
        if arguments.what == "kill":
            found = kill(Path(name), recipe, arguments.moments, arguments.seed)
            bad = bool(found["problems"] or found["lost"] or any(found["endings"].values()))
        else:
            found = many(Path(name), arguments.processes, arguments.seconds, recipe)
            bad = bool(found["errors"] or found["lost_updates"] or found["problems"])
    if arguments.json:
        print(json.dumps({"machine": host.machine().describe(), **found}))
    else:
        print(host.machine().describe())
        print(table(["what", "came to"], [[key, str(value)] for key, value in found.items()], left=(0, 1)))
    sys.exit(bad)


if __name__ == "__main__":
    main()
