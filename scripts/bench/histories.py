"""Change the inputs of a build and change them back, lose files, and compare the catalog with a build from nothing.

python scripts/bench/histories.py [--json] [--only NAME]...

Every build is real, of a model that compiles in seconds, through the command line. After each step the rows that
readers see (variants, workloads, artifacts, weights, tokenizer) are compared with those of a build of the same inputs
into a new catalog. `back_s` is the duration of the last step, which restores the first inputs, and `measured` its
number of trials; a history that loses files rebuilds them, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from llmbuild import digest
from llmbuild.catalog.schema import FILE
from llmbuild.report.rows import table
from llmbuild.runtime import reader

MAIN = [sys.executable, "-m", "llmbuild"]
RECIPE = """\
name: tiny
model: {huggingface: ./model, random_init: true, seed: 0}
workloads:
  - {name: short, prompt: 4, output: 4, context: 16}
objectives: [tpot_s, parameter_bytes]
budget: {trials: 2, time: 20m}
knobs: {opt_level: [O2], layout: [row_major], kernel: [compiler], weight_format: [f32, f16], kv_dtype: [f32], \
data_tiling: ["off"], distribution_size: [64], split_reduction: [false]}
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
SERVED = ("variant", "workload", "artifact", "parameters", "tokenizer", "default", "target")
KINDS = {
    "artifact": "SELECT artifact FROM variant",
    "parameters": "SELECT parameters FROM program",
    "module": "SELECT module FROM program",
    "check data": "SELECT checks FROM program",
    "tokenizer": "SELECT tokenizer FROM standing",
}


@dataclass
class Project:
    """A recipe, a model and a catalog in a folder; `nothing` remembers what builds from nothing served."""

    folder: Path
    nothing: dict[str, list[Any]]
    steps: int = 0
    wrong: list[str] = field(default_factory=list)
    said: str = ""

    @property
    def catalog(self) -> Path:
        """Where everything is built."""
        return self.folder / "catalog"

    def edit(self, old: str, new: str) -> None:
        """Change the recipe."""
        text = (self.folder / "tiny.yaml").read_text()
        assert old in text, old
        (self.folder / "tiny.yaml").write_text(text.replace(old, new))

    def run(self, *arguments: str) -> str:
        """Run a command on the catalog and return its talk."""
        done = subprocess.run(
            [*MAIN, *arguments, "-C", str(self.catalog)], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            self.wrong.append(f"{arguments[0]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return done.stderr

    def build(self) -> None:
        """Build, and hold what is served against a build from nothing."""
        self.steps += 1
        self.said = self.run("build", "tiny.yaml")
        if served(self.catalog) != self.from_nothing():
            self.wrong.append(f"step {self.steps} serves other rows than a build from nothing")

    def from_nothing(self) -> list[Any]:
        """Return what a build of the present inputs into a new catalog serves."""
        files = {p.name: p.read_text() for p in [self.folder / "tiny.yaml", *(self.folder / "model").iterdir()]}
        key = digest.of(files)
        if key not in self.nothing:
            kept = self.catalog.rename(self.folder / "kept")
            self.run("build", "tiny.yaml")
            self.nothing[key] = served(self.catalog)
            shutil.rmtree(self.catalog)
            kept.rename(self.folder / "catalog")
        return self.nothing[key]

    def lose(self, kind: str) -> None:
        """Delete every file of a kind."""
        with sqlite3.connect(self.catalog / FILE) as connection:
            names = {row[0] for row in connection.execute(KINDS[kind]) if row[0]}
        connection.close()
        assert names, kind
        for name in names:
            reader.blob_path(self.catalog, name).unlink(missing_ok=True)


def served(catalog: Path) -> list[Any]:
    """Return what identifies the rows that every reader sees."""
    return sorted([str(row[name]) for name in SERVED] for row in reader.variants(catalog, everything=True))


Step = Callable[[Project], None]


def changed(old: str, new: str) -> tuple[Step, Step]:
    """Return what changes the recipe, and what changes it back."""
    return lambda p: p.edit(old, new), lambda p: p.edit(new, old)


def tokenizer(text: str) -> Step:
    """Return what writes another tokenizer file; what is in it matters to nobody here but by its digest."""
    return lambda p: (p.folder / "model" / "tokenizer.json").write_text(text) and None


def there_and_back(away: Step, back: Step, collect: bool = False) -> Step:
    """Return the history A, B, A."""

    def history(project: Project) -> None:
        project.build()
        away(project)
        project.build()
        if collect:
            project.run("gc")
        back(project)

    return history


def lost(kind: str) -> Step:
    """Return the history of a build whose files of a kind are lost."""

    def history(project: Project) -> None:
        project.build()
        project.lose(kind)

    return history


WORDS = '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,\
"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"%s"}}'
HISTORIES: dict[str, Step] = {
    "weights": there_and_back(*changed("seed: 0", "seed: 1")),
    "weights, gc": there_and_back(*changed("seed: 0", "seed: 1"), collect=True),
    "objectives": there_and_back(*changed("[tpot_s, parameter_bytes]", "[ttft_s]")),
    "knobs": there_and_back(*changed("weight_format: [f32, f16]", "weight_format: [f32]")),
    "workloads": there_and_back(*changed("output: 4, context: 16}", "output: 6, context: 16}")),
    "bounds": there_and_back(*changed("budget:", "constraints: [tpot_s<=1]\nbudget:")),
    "tokenizer": there_and_back(tokenizer(WORDS % "b"), tokenizer(WORDS % "a")),
    **{f"{kind} lost": lost(kind) for kind in KINDS},
}


def play(name: str, folder: Path, nothing: dict[str, list[Any]]) -> dict[str, Any]:
    """Play one history in a folder and return its row."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model" / "tokenizer.json").write_text(WORDS % "a")
    (folder / "tiny.yaml").write_text(RECIPE)
    project = Project(folder, nothing)
    HISTORIES[name](project)
    begin = perf_counter()
    project.build()
    seconds = perf_counter() - begin
    made = re.search(r"(\d+) trials made", project.said)
    again = project.run("build", "tiny.yaml")
    if "nothing to do" not in again:
        project.wrong.append(f"another build has something to do: {again.strip()[-200:]}")
    project.run("verify")
    return {
        "history": name,
        "builds": project.steps + 1,
        "measured": int(made[1]) if made else 0,
        "back_s": round(seconds, 2),
        "as_from_nothing": not project.wrong,
        "wrong": "; ".join(project.wrong),
    }


def main() -> int:
    """Play the histories and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--only", action="append", choices=HISTORIES, help="only this history; may be given again")
    options = parser.parse_args()
    rows, nothing = [], dict[str, list[Any]]()
    for number, name in enumerate(options.only or HISTORIES):
        with TemporaryDirectory(prefix="llmbuild-history-") as folder:
            rows.append(play(name, Path(folder) / str(number), nothing))
        print(f"{name}: {rows[-1]}", file=sys.stderr)
    print(json.dumps(rows, indent=1) if options.json else table(list(rows[0]), [list(row.values()) for row in rows]))
    return 0 if all(row["as_from_nothing"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
