"""Feed mutated and unusual recipes, targets, locks, catalogs, model folders, tokenizers and texts to their readers.

python scripts/bench/fuzz.py [--cases 10000] [--seed 0] [--only KIND]... [--loaded 0.01] [--json]

Each case must be accepted, or refused with one llmbuild error, within seconds, and must write only to its output.
Anything else is a fault: a traceback, a hang, a file elsewhere. Cases are drawn by Hypothesis.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import odd_models
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from odd_texts import Texts
from synthetic import Made, fill

from llmbuild.catalog.exchange.publish import publish
from llmbuild.catalog.exchange.pull import Wanted, pull
from llmbuild.catalog.location import resolved
from llmbuild.catalog.schema import FILE, PUBLISHED_FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.cli import maintenance
from llmbuild.errors import LlmbuildError
from llmbuild.report.rows import table
from llmbuild.runtime import host, lock, reader
from llmbuild.runtime.model import load, pick
from llmbuild.runtime.trust import Policy
from llmbuild.spec.files.reader import read_recipe, read_target
from llmbuild.spec.slo import parse_slo

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 20
LINES = st.sampled_from(
    "knobs: {opt_level: [O9]}|workloads: []|budget: {trials: -1}|name: ../../x|model: {huggingface: /etc}|- - -|&a *a"
    "|? : :|'|{{{|seed: 1e999|x: !!python/object:os.system y|\x00|\t|objectives: tpot_s"
    "|constraints: ['tpot_s<=nan']".split("|")
)
ASKED = parse_slo(["tpot_s<=1"], "tpot_s")


class Hang(BaseException):
    """A case took too long."""


def _late(*_: Any) -> None:
    raise Hang


@st.composite
def mutation(draw: Any) -> Callable[[bytes], bytes]:
    """Return a change of some bytes: flipped, cut, doubled, replaced by others, or a line of mischief put in."""
    kind = draw(st.sampled_from(["flip", "cut", "double", "line", "noise", "none", "text", "random"]))
    where, length = draw(st.floats(0, 1)), draw(st.integers(1, 64))
    noise, line = draw(st.binary(max_size=64)), draw(LINES)

    def change(data: bytes) -> bytes:
        at = int(where * max(0, len(data) - 1))
        if kind == "flip" and data:
            return data[:at] + bytes([data[at] ^ (1 + length)]) + data[at + 1 :]
        if kind == "cut":
            return data[:at]
        if kind == "double":
            return data[: at + length] + data[at:]
        if kind == "line":
            lines = data.split(b"\n")
            lines.insert(int(where * len(lines)), line.encode())
            return b"\n".join(lines)
        if kind == "noise":
            return data[:at] + noise + data[at + len(noise) :]
        if kind == "random":
            return noise * length
        return line.encode() if kind == "text" else data

    return change


class Cases:
    """What is fed, and to whom; every one works in a folder of its own."""

    def __init__(self, folder: Path, loaded: float = 0.0) -> None:
        """Make what is mutated; `loaded` is the part of odd models that is loaded as well."""
        self.folder, self.loaded = folder, loaded
        if loaded:
            pass
        fill(folder / "seed", [Made("default", "dominated", default=True), Made("fast")])
        catalog = Catalog(folder / "seed")
        publish(catalog, (), str(folder / "published"), None)
        catalog.close()
        lock.write(pick(folder / "seed", "m"), folder / "seed.lock")
        self.recipes = [p.read_bytes() for p in sorted((ROOT / "recipes").glob("*.yaml"))]
        self.targets = [p.read_bytes() for p in sorted((ROOT / "targets").glob("*.yaml"))]
        texts = Texts(ROOT / "recipes/pystdlib/tokenizer.json")
        self.tokenizer_bytes, self.tokenizer_values = texts.bytes, texts.values
        self.text, self.ids = texts.text, texts.ids

    def recipe(self, change: Callable[[bytes], bytes], work: Path) -> None:
        """Read a mutated recipe."""
        (work / "r.yaml").write_bytes(change(random.choice(self.recipes)))
        read_recipe(work / "r.yaml")

    def target(self, change: Callable[[bytes], bytes], work: Path) -> None:
        """Read a mutated target."""
        (work / "t.yaml").write_bytes(change(random.choice(self.targets)))
        read_target(work / "t.yaml")

    def locked(self, change: Callable[[bytes], bytes], work: Path) -> None:
        """Load by a mutated lock file."""
        (work / "l.lock").write_bytes(change((self.folder / "seed.lock").read_bytes()))
        load(self.folder / "seed", locked=work / "l.lock")

    def catalog(self, change: Callable[[bytes], bytes], work: Path) -> None:
        """Pick from, and open for writing, a catalog whose database was mutated."""
        shutil.copytree(self.folder / "seed", work / "c")
        with closing(sqlite3.connect(work / "c" / FILE)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        data = (work / "c" / FILE).read_bytes()
        (work / "c" / FILE).write_bytes(change(data))
        pick(work / "c", "m", ["tpot_s<=1"]).explain()
        reader.variants(work / "c", everything=True)
        Catalog(work / "c").close()

    def cells(self, change: Callable[[bytes], bytes], work: Path) -> None:
        """Pick from a catalog that is a sound database with mutated cells."""
        shutil.copytree(self.folder / "seed", work / "c")
        with closing(sqlite3.connect(work / "c" / FILE)) as connection:
            column = random.choice(
                ["variant.point", "program.abi", "target.body", "measurement.ratios", "artifact.runtime"]
            )
            name, _, cell = column.partition(".")
            value = connection.execute(f"SELECT {cell} FROM {name}").fetchone()[0]
            connection.execute(f"UPDATE {name} SET {cell} = ?", (change(value.encode()).decode(errors="replace"),))
            connection.commit()
        pick(work / "c", "m", ["tpot_s<=1"]).explain()
        reader.variants(work / "c", everything=True)

    def publication(self, change: Callable[[bytes], bytes], work: Path) -> None:
        """Pull from a publication with one mutated file."""
        shutil.copytree(self.folder / "published", work / "p")
        files = sorted(p for p in (work / "p").rglob("*") if p.is_file() and p.name != FILE)
        path = random.choice([work / "p" / PUBLISHED_FILE, *files])
        path.chmod(0o600)
        path.write_bytes(change(path.read_bytes()))
        pull(str(work / "p"), work / "got", Wanted(ASKED), Policy())
        load(work / "got", "m", ["tpot_s<=1"])

    def place(self, change: Callable[[bytes], bytes], work: Path) -> None:
        """Publish, check and tidy a catalog in a folder of any name: nothing of it may be lost."""
        name = os.fsdecode(change(b"a?b#c%20d e").replace(b"/", b"").replace(b"\0", b"")[:80]).strip(".") or "x"
        shutil.copytree(self.folder / "seed", work / name)
        before = sorted(p.name for p in (work / name / "blobs").rglob("*"))
        with closing(Catalog(work / name)) as catalog:
            publish(catalog, (), str(work / f"{name}-out"), None)
        for folder in (work / name, work / f"{name}-out"):
            assert maintenance.check(folder, Policy(), lambda *_: None).rows == [], "a sound catalog is called wrong"
        maintenance.collect(work / name, None, False)
        assert sorted(p.name for p in (work / name / "blobs").rglob("*")) == before, "a blob was freed"

    def reference(self, change: Callable[[bytes], bytes], _: Path) -> None:
        """Read a mutated reference; what is taken means the same when it is read again."""
        written = random.choice(
            [f"oci://localhost:5000/team/tiny:v1@sha256:{'a' * 64}", "s3://shelf/a/b", "file:///a%20b"]
        )
        found = resolved(change(written.encode()).decode(errors="surrogateescape"))
        assert resolved(found) == found, "it means another place the second time"

    def model(self, _: Callable[[bytes], bytes], work: Path) -> None:
        """Judge a model folder that is odd, and load some of those that are taken."""
        odd_models.feed(work, random.getrandbits(64), random.random() < self.loaded)


KINDS = (
    *("recipe", "target", "locked", "catalog", "cells", "publication", "place", "reference", "model"),
    *("tokenizer_bytes", "tokenizer_values", "text", "ids"),
)


def run(folder: Path, cases: int, seed: int, kinds: Sequence[str] = KINDS, loaded: float = 0.0) -> dict[str, Any]:
    """Feed `cases` cases and return how many were taken, refused, and what went wrong."""
    fed, came_to, faults = Cases(folder, loaded), Counter[str](), []
    signal.signal(signal.SIGALRM, _late)

    @seeded(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(kinds), mutation(), st.integers(0, 1 << 30))
    def one(kind: str, change: Callable[[bytes], bytes], number: int) -> None:
        random.seed(number)
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        signal.alarm(HANG_S)
        try:
            getattr(fed, kind)(change, work)
            came_to["taken"] += 1
        except LlmbuildError:
            came_to["refused"] += 1
        except Hang:
            faults.append(f"{kind}: hung")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - this is what is looked for; a library's panic is no Exception
            faults.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        finally:
            signal.alarm(0)
        outside = sorted(p.name for p in folder.iterdir() if p.name not in ("seed", "published", "seed.lock", "work"))
        faults.extend(f"{kind}: wrote {name} outside" for name in outside)

    one()
    made = sum(came_to.values()) + len(faults)
    for _ in range(cases - made):  # Hypothesis may stop early where it sees no news
        one.hypothesis.inner_test(random.choice(kinds), mutation().example(), random.randrange(1 << 30))
    return {"cases": cases, "taken": came_to["taken"], "refused": came_to["refused"], "faults": faults}


def main() -> None:
    """Print what came of it; exit 1 on any fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append", help="feed this kind alone; may be given again")
    parser.add_argument("--loaded", type=float, default=0.01, help="part of odd models that is loaded as well")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        found = run(Path(name), arguments.cases, arguments.seed, arguments.only or KINDS, arguments.loaded)
    if arguments.json:
        print(json.dumps({"machine": host.machine().describe(), **found}))
    else:
        print(table(["what", "came to"], [[key, str(value)] for key, value in found.items()], left=(0, 1)))
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
