"""A path is a path whatever it holds, a reference is checked by its grammar, and nothing is freed without proof."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.catalog import garbage, location
from llmbuild.catalog.exchange.publish import Sent, publish
from llmbuild.catalog.exchange.pull import Wanted, pull
from llmbuild.catalog.exchange.remote import remote
from llmbuild.catalog.schema import FILE, PUBLISHED_FILE
from llmbuild.catalog.store import BlobStore
from llmbuild.catalog.verify import verify
from llmbuild.catalog.writer import Catalog
from llmbuild.cli import maintenance
from llmbuild.errors import CatalogError, InputError, LoadRefused
from llmbuild.runtime import reader
from llmbuild.runtime.model import pick
from llmbuild.runtime.trust import Policy
from llmbuild.spec.slo import parse_slo
from tests.support import registry
from tests.support.synthetic import THREE, Made, fill

ANY = Wanted(parse_slo([], "tpot_s"))
EVERYTHING = Wanted(parse_slo([], "tpot_s"), everything=True)
ODD = ["a?b", "a#b", "a%20b", "a b", "a\nb", "a'b\"c", "[x]*", "file:x", "a::b", "größe", "-C", os.fsdecode(b"a\xffb")]
A = "a" * 64


def sent(folder: Path, place: str | Path) -> Sent:
    catalog = Catalog(folder)
    try:
        return publish(catalog, (), str(place), None)
    finally:
        catalog.close()


def findings(folder: Path) -> set[str]:
    return {row["problem"] for row in maintenance.check(folder, Policy(), lambda *_: None).rows}


def blobs(folder: Path) -> set[str]:
    return {name for name, _ in BlobStore(folder).digests()}


@pytest.mark.parametrize("name", ODD)
def test_a_folder_of_any_name_is_a_catalog_a_publication_and_a_place_for_temporary_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    shelf = Path(name) / "c"
    fill(shelf, THREE)
    assert (tmp_path / name / "c" / FILE).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]
    sent(shelf, f"{name}/p")
    pull(f"{name}/p", Path(name) / "got", EVERYTHING, Policy())
    assert [findings(Path(name) / each) for each in ("c", "p", "got")] == [set(), set(), set()]
    assert maintenance.collect(shelf, None, False).rows == []
    assert [pick(Path(name) / each, "m").chosen["tpot_s"] for each in ("c", "p", "got")] == [0.01] * 3  # type: ignore[index]
    source = json.loads((tmp_path / name / "got" / PUBLISHED_FILE).read_text())["source"]
    assert source == str(tmp_path / name / "p"), "means the same from any folder"


def test_a_file_url_is_decoded_and_one_that_is_ambiguous_is_refused(tmp_path: Path) -> None:
    odd = tmp_path / "a b?c#d"
    assert location.folder(odd.as_uri()) == odd
    assert location.folder(str(odd)) == odd
    for text in (f"file://{tmp_path}/a?b", f"file://{tmp_path}/a#b", "file://elsewhere/x", "a\x00b"):
        with pytest.raises(InputError):
            location.folder(text)


@pytest.mark.parametrize(
    ("text", "host", "name", "tag", "digest"),
    [
        ("oci://ghcr.io/team/models", "ghcr.io", "team/models", "latest", ""),
        ("oci://localhost:5000/models:v1.2_x", "localhost:5000", "models", "v1.2_x", ""),
        ("oci://[::1]:5000/a/b__c/d-e:V1", "[::1]:5000", "a/b__c/d-e", "V1", ""),
        (f"oci://h/a@sha256:{A}", "h", "a", "latest", f"sha256:{A}"),
        (f"oci://h/a:v1@sha256:{A}", "h", "a", "v1", f"sha256:{A}"),
    ],
)
def test_a_reference_is_read_by_the_grammar_of_the_specification(
    text: str, host: str, name: str, tag: str, digest: str
) -> None:
    found = location.reference(text)
    assert found == location.Reference(host, name, tag, digest)
    assert location.reference(location.resolved(text)).digest == digest


@pytest.mark.parametrize(
    "text",
    [
        "oci://", "oci://nowhere", "oci:///a", "oci://h/", "oci://h/Team/Models", "oci://h/a//b", "oci://h/a/",
        "oci://h/a:", "oci://h/a:.x", f"oci://h/a:{'x' * 129}", "oci://h/a:v 1", "oci://h/a@sha256:12",
        f"oci://h/a@md5:{A}", f"oci://h/a@sha256:{A.upper()}", f"oci://h/a:@sha256:{A}", "oci://h:0/a", "oci://h:70000/a",
        "oci://h:x/a", "oci://user@h/a", "oci://[::1/a", "oci://[zz]/a", "oci://h_h/a", "oci://h/a?b", "oci://h/a#b",
        "oci://h/a\nb", "oci://h/../x", "oci://h/.a", f"oci://h/{'a' * 255}", "s3://", "s3:///k", "s3://Bucket/k", "s3://a_b/k",
        "s3://bucket//k", "s3://bucket/../k", "gs://B/k", "gs://bu/", "s3://bucket/a b", "s3://bucket/a\x1bb",
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused_before_anything_is_sent(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something was sent"))
    with pytest.raises(InputError, match="://"):
        remote(text)


@given(st.from_regex(r"[a-zA-Z0-9._:/@\[\]?#% -]{0,40}", fullmatch=True))
def test_a_reference_is_refused_or_means_itself(text: str) -> None:
    try:
        found = location.reference(f"oci://{text}")
    except InputError:
        return
    assert location.reference(f"oci://{found}") in (
        found,
        location.Reference(found.host, found.name, "latest", found.digest),
    )
    assert not set(str(found)) & set("?#% ")


def test_a_digest_is_pulled_with_or_without_a_tag_and_is_never_published_to(tmp_path: Path) -> None:
    fill(tmp_path / "shelf", THREE)
    with registry.small() as (address, stored):
        sent(tmp_path / "shelf", f"oci://{address}/team/tiny:v1")
        import hashlib

        data = stored["manifests", "v1"][0]
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        stored["manifests", digest] = stored["manifests", "v1"]
        for text in (f"team/tiny@{digest}", f"team/tiny:other@{digest}"):
            got = pull(f"oci://{address}/{text}", tmp_path / digest[7:12] / text[-80:-72], EVERYTHING, Policy())
            assert got.fetched_blobs > 0
        before = dict(stored)
        with pytest.raises(InputError, match="publish to a tag"):
            sent(tmp_path / "shelf", f"oci://{address}/team/new:v1@{digest}")
        assert stored == before, "nothing was sent"
        stored["manifests", digest] = (data + b" ", "")
        with pytest.raises(LoadRefused, match="other bytes than the digest says"):
            pull(f"oci://{address}/team/tiny@{digest}", tmp_path / "no", ANY, Policy())


def another_database(shelf: Path, made: list[Made]) -> None:
    """Put the database of another catalog in the place of a catalog's own."""
    other = shelf.with_name("other")
    fill(other, made) if made else Catalog(other).close()
    for path in shelf.glob("catalog.sqlite*"):
        path.unlink()
    with closing(sqlite3.connect(other / FILE)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copyfile(other / FILE, shelf / FILE)


@pytest.mark.parametrize("made", [[], [Made("x", artifact=b"x", parameters=b"y")]])
def test_nothing_is_freed_and_nothing_is_an_orphan_where_the_database_is_another_ones(
    made: list[Made], tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    fill(shelf, THREE)
    another_database(shelf, made)
    before = blobs(shelf)
    assert "stranger" in findings(shelf)
    assert "orphan" not in findings(shelf)
    for dry in (True, False):
        with pytest.raises(CatalogError, match="nothing is freed"):
            maintenance.collect(shelf, None, dry)
    assert blobs(shelf) == before


def test_what_a_killed_process_left_is_still_freed(tmp_path: Path) -> None:
    fill(tmp_path / "shelf", THREE)
    catalog = Catalog(tmp_path / "shelf", alone=True)
    left = {catalog.blobs.put_bytes(f"left {n}".encode()) for n in range(40)}
    assert {f.problem for f in verify(catalog)} == {"orphan"}
    assert {r.digest for r in garbage.collect(catalog).removed} >= left
    catalog.close()


def test_publishing_into_a_catalog_that_is_built_in_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    fill(tmp_path / "shelf", THREE)
    fill(tmp_path / "mine", [Made("own", artifact=b"own", parameters=b"own")], model="own")
    before = blobs(tmp_path / "mine")
    for place in ("mine", "shelf"):
        with pytest.raises(CatalogError, match="built in"):
            sent(tmp_path / "shelf", tmp_path / place)
    assert blobs(tmp_path / "mine") == before


def publication(tmp_path: Path, name: str) -> set[str]:
    """Publish one more variant, and return the blobs of what is current then."""
    fill(tmp_path / "shelf", [Made(name, artifact=name.encode(), tpot_s=0.001)], model="m")
    sent(tmp_path / "shelf", tmp_path / "pub")
    pointer = json.loads((tmp_path / "pub" / PUBLISHED_FILE).read_text())
    body = json.loads(reader.blob_path(tmp_path / "pub", pointer["manifest"]).read_text())
    return {pointer["manifest"], body["catalog"]["digest"], *body["blobs"]}


@pytest.mark.parametrize("pulled", [False, True])
def test_a_publication_and_the_one_before_stay_and_older_ones_are_freed(pulled: bool, tmp_path: Path) -> None:
    kept = []
    for name in ("one", "two", "three"):
        kept.append(publication(tmp_path, name))
        if pulled:
            pull(str(tmp_path / "pub"), tmp_path / "got", EVERYTHING, Policy())
    folder = tmp_path / ("got" if pulled else "pub")
    assert blobs(folder) == kept[1] | kept[2]
    assert kept[0] - blobs(folder), "something of the first was freed"
    assert findings(folder) == set()


def rewritten(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def test_verify_checks_that_a_publication_holds_what_its_pointer_promises(tmp_path: Path) -> None:
    current = publication(tmp_path, "one")
    pub = tmp_path / "pub"
    assert findings(pub) == set()
    rewritten(pub / FILE, b"another file")
    assert findings(pub) == {"copy"}
    gone = next(name for name in current if name == pick(pub, "m").chosen["artifact"])  # type: ignore[index]
    reader.blob_path(pub, gone).unlink()
    assert "missing" in findings(pub)


def test_verify_finds_an_empty_publication(tmp_path: Path) -> None:
    from llmbuild import digest

    publication(tmp_path, "one")
    pub, empty = tmp_path / "pub", tmp_path / "empty"
    Catalog(empty).close()
    with closing(sqlite3.connect(empty / FILE)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    pointer = json.loads((pub / PUBLISHED_FILE).read_text())
    body = json.loads(reader.blob_path(pub, pointer["manifest"]).read_text())
    store = BlobStore(pub)
    name = store.put_file(empty / FILE)
    body |= {"blobs": {}, "variants": [], "catalog": {"digest": name, "bytes": (empty / FILE).stat().st_size}}
    pointer["manifest"] = store.put_bytes(digest.canonical(body).encode())
    rewritten(pub / PUBLISHED_FILE, json.dumps(pointer).encode())
    rewritten(pub / FILE, (empty / FILE).read_bytes())
    assert findings(pub) == {"empty"}
