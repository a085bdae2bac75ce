"""What is served after any history of builds is what a build from nothing gives."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmbuild import digest
from llmbuild.catalog import garbage, verify
from llmbuild.catalog.exchange import merge
from llmbuild.catalog.place import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.runtime import reader
from llmbuild.runtime.chat import ChatTemplate
from llmbuild.runtime.model import pick
from llmbuild.spec.trial import FRONT
from tests.support.quick import FORMATS, Asked, build, job_of

SERVED = "variant workload status tpot_s quality_kl parameter_bytes artifact parameters tokenizer chat default".split()
A, B = Asked(), Asked(weights="two")
CHATTY = replace(A, chat="{{ messages }}")


def served(catalog: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows that every reader sees of a name, without what a clock says."""
    rows = reader.variants(catalog, name, everything=True)
    return sorted(({k: r[k] for k in SERVED} for r in rows), key=lambda r: (r["variant"], r["workload"]))


def fresh(asked: Asked, folder: Path) -> list[dict[str, Any]]:
    """Return what a build from nothing serves."""
    with_nothing = Path(mkdtemp(dir=folder))
    build(asked, with_nothing / "c", folder / "m")
    try:
        return served(with_nothing / "c", asked.name)
    finally:
        shutil.rmtree(with_nothing)


def picked(catalog: Path, asked: Asked) -> str:
    """Return the variant that a loader opens."""
    made = pick(catalog, asked.name, [], asked.objectives[0], workload=asked.workloads[0])
    assert made.chosen is not None
    return str(made.chosen["variant"])


CHANGES = {
    "weights": B,
    "tokenizer": replace(A, tokenizer="other words"),
    "chat template": CHATTY,
    "held-out text": replace(A, text="another text"),
    "objectives": replace(A, objectives=("ttft_s", "quality_kl")),
    "bounds": replace(A, bound=0.015),
    "knobs": replace(A, formats=("f32",)),
    "workloads": replace(A, workloads=("short", "long")),
    "compiler": replace(A, compiler="3.14.0"),
}


@pytest.mark.parametrize("other", CHANGES.values(), ids=CHANGES)
def test_switching_to_other_inputs_and_back_serves_what_a_build_from_nothing_gives_and_costs_nothing(
    other: Asked, tmp_path: Path
) -> None:
    catalog = tmp_path / "c"
    first = build(A, catalog, tmp_path / "m")
    before, chosen = served(catalog, "m"), picked(catalog, A)
    build(other, catalog, tmp_path / "m")
    between = served(catalog, "m")
    told: list[str] = []
    back = build(A, catalog, tmp_path / "m", lambda event: told.append(event.text))
    assert first.measured > 1
    assert between == fresh(other, tmp_path)
    assert between != before
    assert (served(catalog, "m"), picked(catalog, A)) == (before, chosen)
    assert (back.imported, back.compiled, back.measured, back.outcome.made) == (0, 0, 0, 0)
    assert any("stand again" in text for text in told)
    assert build(A, catalog, tmp_path / "m").outcome.ended == "up to date"


def test_two_names_of_one_model_with_two_tokenizers_keep_their_own(tmp_path: Path) -> None:
    catalog, other = tmp_path / "c", replace(A, name="n", tokenizer="other words")
    build(A, catalog, tmp_path / "m")
    build(other, catalog, tmp_path / "m")
    build(A, catalog, tmp_path / "m")
    assert {name: served(catalog, name) for name in ("m", "n")} == {
        "m": fresh(A, tmp_path),
        "n": fresh(other, tmp_path),
    }


def test_another_chat_template_is_served_at_once_and_nothing_is_made_for_it(tmp_path: Path) -> None:
    catalog = tmp_path / "c"
    build(CHATTY, catalog, tmp_path / "m")
    for other in (replace(A, chat="{{ another }}"), A, CHATTY):
        done = build(other, catalog, tmp_path / "m")
        assert (done.imported, done.compiled, done.measured, done.outcome.made) == (0, 0, 0, 0)
        assert served(catalog, "m") == fresh(other, tmp_path)
        assert build(other, catalog, tmp_path / "m").outcome.ended == "up to date"


def test_a_chat_template_is_that_of_every_machine_that_ranked_the_model(tmp_path: Path) -> None:
    """It decides no reading: what another machine measured is answered through the new one too."""
    catalog = tmp_path / "c"
    build(A, catalog, tmp_path / "m")
    with sqlite3.connect(catalog / FILE) as connection:
        connection.execute("INSERT INTO machine SELECT 'other', name, body FROM machine")
        connection.execute("UPDATE standing SET machine = 'other', id = id + 100")
    build(CHATTY, catalog, tmp_path / "m")
    with sqlite3.connect(catalog / FILE) as connection:
        found = set(connection.execute("SELECT machine = 'other', chat FROM standing"))
    assert found == {(on_other, digest.of_bytes(ChatTemplate(CHATTY.chat).blob())) for on_other in (0, 1)}


def test_a_key_does_not_depend_on_a_chat_template_where_there_is_none(tmp_path: Path) -> None:
    """The digests of catalogs that were built before chat templates were kept."""
    job = job_of(replace(A, name="fixed"), tmp_path)
    inputs = {"scope": job.scope, "objectives": job.recipe.objectives, "spaces": (job.space, job.declared)}
    assert job.ranking == digest.of({**inputs, "bounds": (*job.recipe.constraints, *job.recipe.quality.bounds)})
    assert job_of(CHATTY, tmp_path).scope == job_of(A, tmp_path).scope
    assert job_of(CHATTY, tmp_path).source == job_of(A, tmp_path).source
    assert job_of(CHATTY, tmp_path).ranking != job_of(A, tmp_path).ranking


@pytest.mark.parametrize("kind", ["artifact", "parameters", "module", "checks", "tokenizer", "chat_template"])
def test_a_file_that_is_lost_is_made_again_and_nothing_is_measured_for_it(kind: str, tmp_path: Path) -> None:
    catalog = tmp_path / "c"
    build(CHATTY, catalog, tmp_path / "m")
    before = served(catalog, "m")
    opened = Catalog(catalog)
    names = {name for v in before for name in _files(opened, v["variant"])[kind]}
    for name in names:
        opened.blobs.remove(name)
    assert {f.problem for f in verify.verify(opened)} == {"missing"}
    opened.close()
    done = build(CHATTY, catalog, tmp_path / "m")
    opened = Catalog(catalog)
    found = verify.verify(opened)
    opened.close()
    assert (found, served(catalog, "m"), done.measured) == ([], before, 0)
    assert build(CHATTY, catalog, tmp_path / "m").outcome.ended == "up to date"


def _files(catalog: Catalog, variant: str) -> dict[str, set[str]]:
    query = (
        "SELECT v.artifact, p.parameters, p.module, p.checks, s.tokenizer, s.chat FROM variant v "
        "JOIN program p ON p.digest = v.program LEFT JOIN standing s ON s.variant = v.digest WHERE v.digest = ?"
    )
    kinds = ("artifact", "parameters", "module", "checks", "tokenizer", "chat_template")
    rows = catalog._rows(query, variant)
    return {kind: {row[n] for row in rows if row[n]} for n, kind in enumerate(kinds)}


def test_a_front_that_gc_took_while_another_stood_is_made_again_with_the_same_bytes(tmp_path: Path) -> None:
    catalog = tmp_path / "c"
    build(A, catalog, tmp_path / "m")
    before = served(catalog, "m")
    build(B, catalog, tmp_path / "m")
    opened = Catalog(catalog, alone=True)
    swept = garbage.collect(opened)
    opened.close()
    back = build(A, catalog, tmp_path / "m")
    opened = Catalog(catalog)
    lost = opened.lost()
    opened.close()
    assert swept.removed
    assert (served(catalog, "m"), lost, back.measured) == (before, set(), 0)
    assert back.imported > 0


def test_another_model_of_one_name_stays_behind_in_a_merge_and_is_told(tmp_path: Path) -> None:
    build(A, tmp_path / "a", tmp_path / "m")
    build(B, tmp_path / "b", tmp_path / "m")
    source, into = Catalog(tmp_path / "b"), Catalog(tmp_path / "a")
    done = merge.merge(source, into)
    source.close()
    into.close()
    assert served(tmp_path / "a", "m") == fresh(A, tmp_path)
    assert done.conflicts[0].startswith("m: is another model there")
    assert build(B, tmp_path / "a", tmp_path / "m").measured == 0  # its trials came along
    assert served(tmp_path / "a", "m") == fresh(B, tmp_path)


class Histories(RuleBasedStateMachine):
    """Change anything, lose anything, collect, build again: what is served is what a build from nothing gives."""

    known: dict[Asked, list[dict[str, Any]]] = {}  # noqa: RUF012 - what a build from nothing gives never changes
    scratch: Path

    @initialize()
    def begin(self) -> None:
        self.folder = Path(mkdtemp(dir=Histories.scratch))
        self.catalog = self.folder / "c"
        self.asked = A
        self.stands: dict[str, Asked] = {}
        self.build()

    def build(self) -> None:
        build(self.asked, self.catalog, Histories.scratch / "m")
        self.stands[self.asked.name] = self.built = self.asked

    @rule(
        weights=st.sampled_from(["one", "two"]),
        tokenizer=st.sampled_from(["words", "other"]),
        chat=st.sampled_from(["", "{{ messages }}", "{{ another }}"]),
    )
    def change_the_model(self, weights: str, tokenizer: str, chat: str) -> None:
        self.asked = replace(self.asked, weights=weights, tokenizer=tokenizer, chat=chat)

    @rule(objectives=st.sampled_from([("tpot_s", "parameter_bytes"), ("ttft_s",)]), bound=st.sampled_from([1.0, 0.015]))
    def change_the_objectives(self, objectives: tuple[str, ...], bound: float) -> None:
        self.asked = replace(self.asked, objectives=objectives, bound=bound)

    @rule(
        formats=st.sampled_from([FORMATS, ("f32",), ("f16", "int8")]),
        workloads=st.sampled_from([("short",), ("short", "long")]),
        text=st.sampled_from(["held out", "more"]),
    )
    def change_the_recipe(self, formats: tuple[str, ...], workloads: tuple[str, ...], text: str) -> None:
        self.asked = replace(self.asked, formats=formats, workloads=workloads, text=text)

    @rule(name=st.sampled_from(["m", "n"]), compiler=st.sampled_from(["3.13.0", "3.14.0"]))
    def change_the_name_or_the_tools(self, name: str, compiler: str) -> None:
        self.asked = replace(self.asked, name=name, compiler=compiler)

    @rule(number=st.integers(0, 1 << 20), damage=st.booleans())
    def lose_a_file_and_build(self, number: int, damage: bool) -> None:
        paths = sorted(p for p in (self.catalog / "blobs").rglob("*") if p.is_file())
        path = paths[number % len(paths)]
        if damage:
            path.chmod(0o600)
            path.write_bytes(b"damaged")
        else:
            path.unlink()
        self.build()

    @rule()
    def collect(self) -> None:
        opened = Catalog(self.catalog, alone=True)
        garbage.collect(opened)
        opened.close()

    @rule()
    def build_what_is_asked(self) -> None:
        self.build()

    @precondition(lambda self: self.asked == self.stands.get(self.asked.name))
    @rule()
    def build_again_and_do_nothing(self) -> None:
        done = build(self.asked, self.catalog, Histories.scratch / "m")
        assert (done.measured, done.outcome.made) == (0, 0)

    @invariant()
    def what_is_served_is_what_a_build_from_nothing_gives(self) -> None:
        for name, asked in getattr(self, "stands", {}).items():
            if asked not in self.known:
                self.known[asked] = fresh(asked, Histories.scratch)
            assert served(self.catalog, name) == self.known[asked]

    @invariant()
    def every_file_of_the_front_just_built_is_there(self) -> None:
        if not hasattr(self, "stands"):
            return
        opened = Catalog(self.catalog)
        lost = opened.lost()
        opened.close()
        mine = {r["variant"] for r in served(self.catalog, self.asked.name) if r["status"] in FRONT}
        if self.asked == self.built:  # a model of another name may have lost files since its own build
            assert not lost & mine


@pytest.fixture(autouse=True, scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    Histories.scratch = tmp_path_factory.mktemp("histories")


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=6, stateful_step_count=8, suppress_health_check=list(HealthCheck))
