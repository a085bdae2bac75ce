"""A model's chat template is kept, collected, checked, sent and pinned as its tokenizer is."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild import digest
from llmbuild.catalog import garbage, verify
from llmbuild.catalog.exchange import merge
from llmbuild.catalog.exchange.publish import publish
from llmbuild.catalog.exchange.pull import Wanted, pull
from llmbuild.catalog.names import Registered
from llmbuild.catalog.place import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import InputError, LoadRefused
from llmbuild.runtime import load, lock, reader
from llmbuild.runtime.chat import ChatTemplate
from llmbuild.runtime.model import pick
from llmbuild.runtime.trust import Policy
from llmbuild.spec.slo import parse_slo
from llmbuild.spec.trial import Standing
from tests.support import registry
from tests.support.quick import MACHINE, TARGET, Asked, build
from tests.support.synthetic import toolchain

TEMPLATE = ChatTemplate("{{ messages[0].content }}")
A = Asked(chat=TEMPLATE.template)
NAME = digest.of_bytes(TEMPLATE.blob())
WITHOUT = Asked()


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    build(A, tmp_path / "shelf", tmp_path / "m")
    return tmp_path / "shelf"


@pytest.fixture(params=["folder", "registry"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "published")
    else:
        with registry.small() as (address, _):
            yield f"oci://{address}/models/chatty:v1"


def sent(folder: Path, place: str) -> None:
    catalog = Catalog(folder)
    publish(catalog, (), place, None)
    catalog.close()


def chats(folder: Path) -> set[str | None]:
    return {row["chat"] for row in reader.variants(folder, "m", everything=True)}


def merged(source: Path, into: Path) -> list[str]:
    a, b = Catalog(source), Catalog(into)
    try:
        return merge.merge(a, b).conflicts
    finally:
        a.close()
        b.close()


@pytest.mark.parametrize("everything", [True, False])
def test_it_is_published_and_pulled(shelf: Path, place: str, everything: bool, tmp_path: Path) -> None:
    sent(shelf, place)
    pull(place, tmp_path / "got", Wanted(parse_slo([], "tpot_s"), everything=everything), Policy())
    with load(tmp_path / "got", "m") as model:
        assert model.chat_template == TEMPLATE
    assert chats(tmp_path / "got") == {NAME}


def test_a_publication_names_it_for_each_variant(shelf: Path, tmp_path: Path) -> None:
    sent(shelf, str(tmp_path / "out"))
    (record,) = (shelf / "published").glob("*.json")
    body = json.loads(record.read_text())
    assert {variant["chat"] for variant in body["variants"]} == {NAME}
    assert body["blobs"][NAME]["kind"] == "chat_template"


def test_a_published_variant_that_two_recipes_share_has_the_template_of_the_published_one(
    shelf: Path, tmp_path: Path
) -> None:
    build(replace(WITHOUT, name="n"), shelf, tmp_path / "m")  # writes the variants' rows anew
    catalog = Catalog(shelf)
    publish(catalog, ("m",), str(tmp_path / "out"), None)
    catalog.close()
    with sqlite3.connect(tmp_path / "out" / FILE) as connection:
        assert connection.execute("SELECT DISTINCT chat FROM variant").fetchall() == [(NAME,)]
    assert {row["chat"] for row in reader.variants(shelf, "n", everything=True)} == {None}


def test_it_is_merged_and_one_that_differs_is_told(shelf: Path, tmp_path: Path) -> None:
    assert merged(shelf, tmp_path / "all") == []
    assert chats(tmp_path / "all") == {NAME}
    assert reader.blob_path(tmp_path / "all", NAME).read_bytes() == TEMPLATE.blob()
    fewer = replace(A, chat="{{ another }}", formats=("f32",))
    build(fewer, tmp_path / "here", tmp_path / "m")
    told = merged(shelf, tmp_path / "here")
    assert "m: has another chat template there" in told[0]
    assert len(chats(tmp_path / "here")) == 2
    build(replace(A, chat="{{ another }}"), tmp_path / "here", tmp_path / "m")
    assert chats(tmp_path / "here") == {digest.of_bytes(ChatTemplate("{{ another }}").blob())}


def test_a_catalog_without_one_takes_rows_that_have_one(shelf: Path, tmp_path: Path) -> None:
    build(replace(WITHOUT, formats=("f32",)), tmp_path / "here", tmp_path / "m")
    assert not any("chat template" in told for told in merged(shelf, tmp_path / "here"))
    assert chats(tmp_path / "here") == {NAME, None}


def test_gc_keeps_the_present_one_and_frees_the_one_before(shelf: Path, tmp_path: Path) -> None:
    def collected() -> dict[str, str]:
        catalog = Catalog(shelf, alone=True)
        try:
            return {removal.digest: removal.kind for removal in garbage.collect(catalog).removed}
        finally:
            catalog.close()

    assert NAME not in collected()
    build(replace(A, chat="{{ another }}"), shelf, tmp_path / "m")
    with sqlite3.connect(shelf / FILE) as connection:
        connection.execute("UPDATE variant SET chat = NULL")  # as where only the standings were written anew
    assert collected() == {NAME: "orphan"}
    assert chats(shelf) == {digest.of_bytes(ChatTemplate("{{ another }}").blob())}


def test_verify_finds_a_changed_one_and_a_missing_one(shelf: Path) -> None:
    path = reader.blob_path(shelf, NAME)

    def problems() -> set[tuple[str, str]]:
        catalog = Catalog(shelf)
        try:
            return {(found.problem, found.what.split()[0]) for found in verify.verify(catalog)}
        finally:
            catalog.close()

    assert problems() == set()
    path.chmod(0o600)
    path.write_bytes(b"{}")
    assert problems() == {("corrupt", "chat_template")}
    with pytest.raises(LoadRefused, match="the chat template was changed after it was built"):
        load(shelf, "m")
    path.unlink()
    assert problems() == {("missing", "chat_template")}
    with pytest.raises(LoadRefused, match="the chat template is missing"):
        load(shelf, "m")


def test_a_lock_pins_it_and_a_lock_of_before_pins_none(shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "llmbuild.lock"
    lock.write(pick(shelf, "m"), path)
    body = json.loads(path.read_text())
    assert body["chat"] == NAME
    load(shelf, locked=path).close()
    build(replace(A, chat="{{ another }}"), shelf, tmp_path / "m")
    with pytest.raises(LoadRefused, match=f"pins chat {NAME}"):
        load(shelf, locked=path)
    del body["chat"]
    path.write_text(json.dumps(body))
    with load(shelf, locked=path) as model:
        assert model.chat_template == ChatTemplate("{{ another }}")


def test_a_standing_of_this_machine_alone_has_the_one_of_the_others(shelf: Path) -> None:
    row = reader.variants(shelf, "m")[0]
    here = replace(MACHINE, cores=99)
    names = Registered(TARGET, here, toolchain())
    catalog = Catalog(shelf)
    catalog.register(names)
    catalog.add_standing("m", names, Standing(row["variant"], "short", "undecided", None, "measured alone", None))
    catalog.close()
    found = [r for r in reader.variants(shelf, "m") if r["machine_digest"] == digest.of(here)]
    assert [(r["variant"], r["chat"]) for r in found] == [(row["variant"], NAME)]


def test_a_model_without_one_says_so(tmp_path: Path) -> None:
    build(WITHOUT, tmp_path / "c", tmp_path / "m")
    with load(tmp_path / "c", "m") as model:
        assert model.chat_template is None
        with pytest.raises(InputError, match=r"model m has no chat template in .*: give `generate` a text, or build"):
            model.chat([{"role": "user", "content": "a"}])
