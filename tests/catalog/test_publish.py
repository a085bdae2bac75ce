from __future__ import annotations

import json
import os
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmbuild.catalog.exchange import remote as remotes
from llmbuild.catalog.exchange.publish import Sent, publish
from llmbuild.catalog.exchange.pull import Pulled, Wanted, pull
from llmbuild.catalog.schema import FILE, PUBLISHED_FILE, open_engine
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import CatalogError, InputError, LoadRefused, NoVariant
from llmbuild.runtime import load, reader
from llmbuild.runtime.model import pick
from llmbuild.runtime.trust import Policy
from llmbuild.spec.slo import parse_slo
from tests.conftest import Project, llmbuild
from tests.support import registry
from tests.support.synthetic import THREE, Made, fill, slower

pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # by gcsfs, of whole blobs

ANY = Wanted(parse_slo([], "tpot_s"))
EVERYTHING = Wanted(parse_slo([], "tpot_s"), everything=True)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    fill(tmp_path / "shelf", [*THREE, Made("lost", "dominated", 0.05, parameters=b"other weights")])
    return tmp_path / "shelf"


def sent(folder: Path, place: str | Path, models: tuple[str, ...] = ()) -> Sent:
    catalog = Catalog(folder)
    try:
        return publish(catalog, models, str(place), None)
    finally:
        catalog.close()


def pulled(place: str | Path, into: Path, wanted: Wanted = ANY, rule: Policy = Policy()) -> Pulled:  # noqa: B008
    return pull(str(place), into, wanted, rule)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an S3 server on loopback."""
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'").ThreadedMotoServer(
        port=0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    keys = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = dict(os.environ)
    os.environ.update(keys)
    import fsspec

    fsspec.filesystem("s3").mkdir("shelf")
    try:
        yield "s3://shelf"
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        os.environ.clear()
        os.environ.update(before)
        server.stop()


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    """A bucket of a Google Cloud Storage emulator on loopback."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="shelf")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks Google what kind of bucket this is
        pytest.importorskip("gcsfs", reason="pip install gcsfs")
        import fsspec

        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        yield "gs://shelf"
    server.stop()


@pytest.fixture(params=["folder", "s3", "gs", "memory", "oci", "docker-registry"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Every kind of destination there is."""
    name = tmp_path.name.replace("_", "-").replace("[", "").replace("]", "").lower()
    if request.param == "folder":
        yield str(tmp_path / "published")
    elif request.param in ("s3", "gs"):
        yield f"{request.getfixturevalue({'s3': 'bucket', 'gs': 'google'}[request.param])}/{name}"
    elif request.param == "memory":
        yield f"memory://{name}"
    elif request.param == "oci":
        with registry.small() as (address, _):
            yield f"oci://{address}/models/tiny:v1"
    else:
        if registry.BINARY is None:
            pytest.skip("no docker-registry here: apt-get install docker-registry")
        with registry.real(tmp_path) as address:
            yield f"oci://{address}/models/tiny:v1"


def test_what_is_pulled_is_what_was_published(shelf: Path, place: str, tmp_path: Path) -> None:
    before = {r["variant"]: r for r in reader.variants(shelf, everything=True) if r["point"]["name"] != "lost"}
    sent(shelf, place)
    pulled(place, tmp_path / "got", EVERYTHING)
    after = {r["variant"]: r for r in reader.variants(tmp_path / "got", everything=True)}
    assert after == before
    for row in after.values():
        path = reader.blob_path(tmp_path / "got", row["artifact"])
        assert path.read_bytes() == reader.blob_path(shelf, row["artifact"]).read_bytes()


def test_publishing_again_sends_nothing_and_a_change_sends_only_what_is_new(shelf: Path, place: str) -> None:
    first, again = sent(shelf, place), sent(shelf, place)
    fill(shelf, [Made("new", artifact=b"one more")], model="other")
    more = sent(shelf, place)
    assert (first.changed, again.changed, again.sent_blobs) == (True, False, 0)
    assert (more.changed, more.sent_blobs) == (True, 3)  # its artifact, the database, the manifest


def test_an_upload_that_was_cut_off_goes_on_where_it_stopped(
    shelf: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(remotes.remote(place))
    real_put, calls = kind.put, []

    def cut_off(self: Any, digest: str, path: Path) -> None:
        if len(calls) == 4:
            raise CatalogError("cut off")
        calls.append(digest)
        real_put(self, digest, path)

    monkeypatch.setattr(kind, "put", cut_off)
    with pytest.raises(CatalogError, match="cut off"):
        sent(shelf, place)
    with pytest.raises(CatalogError, match="nothing is published"):
        pulled(place, tmp_path / "early")
    monkeypatch.setattr(kind, "put", real_put)
    done = sent(shelf, place)
    assert done.sent_blobs == done.blobs + 1 - 4
    assert pulled(place, tmp_path / "got").rows[0]["point"]["name"] == "fast"


def test_a_reader_sees_the_publication_before_until_the_new_one_is_whole(
    shelf: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = sent(shelf, place)
    fill(shelf, slower(THREE, 2), model="m")
    monkeypatch.setattr(type(remotes.remote(place)), "finish", lambda *_: (_ for _ in ()).throw(CatalogError("killed")))
    with pytest.raises(CatalogError, match="killed"):
        sent(shelf, place)
    seen = pulled(place, tmp_path / "seen", EVERYTHING)
    assert seen.digest == old.digest
    monkeypatch.undo()
    assert pulled(place, tmp_path / "later").digest == old.digest != sent(shelf, place).digest


def test_pull_fetches_only_what_the_slo_needs_here(shelf: Path, place: str, tmp_path: Path) -> None:
    sent(shelf, place)
    got = pulled(place, tmp_path / "got", Wanted(parse_slo([], "ttft_s")))
    assert [r["point"]["name"] for r in got.rows] == ["small"]
    there = {r["point"]["name"] for r in reader.variants(tmp_path / "got") if _is_here(tmp_path / "got", r)}
    assert (there, got.fetched_blobs, got.left_bytes > 0) == ({"small"}, 3, True)
    made = pick(tmp_path / "got", "m", objective="tpot_s")
    assert made.chosen is not None
    assert made.chosen["point"]["name"] == "small"
    assert "llmbuild pull" in next(c.reason for c in made.candidates if c.row["tpot_s"] == 0.01)


def _is_here(folder: Path, row: dict) -> bool:
    return reader.blob_path(folder, row["artifact"]).is_file()


def test_nothing_is_fetched_when_nothing_meets_the_slo(shelf: Path, tmp_path: Path) -> None:
    sent(shelf, tmp_path / "pub")
    with pytest.raises(NoVariant, match="the nearest is"):
        pulled(tmp_path / "pub", tmp_path / "got", Wanted(parse_slo(["tpot_s<=1e-9"], None)))
    assert not (tmp_path / "got").exists()


def test_a_blob_changed_in_the_remote_is_refused(shelf: Path, tmp_path: Path) -> None:
    sent(shelf, tmp_path / "pub")
    row = next(r for r in reader.variants(shelf) if r["point"]["name"] == "fast")
    path = reader.blob_path(tmp_path / "pub", row["artifact"])
    path.chmod(0o600)
    path.write_bytes(b"other bytes")
    with pytest.raises(LoadRefused, match="other bytes than the manifest says"):
        pulled(tmp_path / "pub", tmp_path / "got")
    assert not (tmp_path / "got" / PUBLISHED_FILE).exists()


def test_a_published_folder_is_a_catalog_that_is_only_read(shelf: Path, tmp_path: Path) -> None:
    sent(shelf, tmp_path / "pub")
    with sqlite3.connect(tmp_path / "pub" / FILE) as connection:
        names = connection.execute("SELECT count(*) FROM front").fetchone()
    assert (names, connection.execute("PRAGMA journal_mode").fetchone()) == ((2,), ("delete",))
    connection.close()
    with pytest.raises(CatalogError, match="only read"):
        open_engine(tmp_path / "pub")


def test_pulling_into_a_catalog_that_is_built_in_merges(shelf: Path, tmp_path: Path) -> None:
    sent(shelf, tmp_path / "pub")
    fill(tmp_path / "mine", [Made("own")], model="own")
    pulled(tmp_path / "pub", tmp_path / "mine")
    assert reader.models(tmp_path / "mine") == ["m", "own"]
    assert not (tmp_path / "mine" / PUBLISHED_FILE).exists()


def test_only_the_models_asked_for_are_published(shelf: Path, tmp_path: Path) -> None:
    fill(shelf, [Made("x")], model="other")
    sent(shelf, tmp_path / "pub", ("other",))
    assert reader.models(tmp_path / "pub") == ["other"]
    with pytest.raises(InputError, match="no front of none"):
        sent(shelf, tmp_path / "pub", ("none",))
    with pytest.raises(InputError, match="it has other"):
        pulled(tmp_path / "pub", tmp_path / "got", Wanted(parse_slo([], None), models=("m",)))


def test_gc_keeps_what_was_published(shelf: Path, tmp_path: Path) -> None:
    from llmbuild.catalog import garbage

    sent(shelf, tmp_path / "pub")
    with sqlite3.connect(shelf / FILE) as connection:
        connection.execute("UPDATE standing SET status = 'dominated'")
    connection.close()
    catalog = Catalog(shelf, alone=True)
    removed = {r.digest for r in garbage.collect(catalog).removed}
    catalog.close()
    kept = {r["artifact"] for r in reader.variants(tmp_path / "pub", everything=True)}
    assert not removed & kept
    assert removed


def test_a_damaged_catalog_is_not_published(shelf: Path, tmp_path: Path) -> None:
    path = reader.blob_path(shelf, reader.variants(shelf)[0]["artifact"])
    path.chmod(0o600)
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="llmbuild verify"):
        sent(shelf, tmp_path / "pub")
    assert not (tmp_path / "pub" / PUBLISHED_FILE).exists()


def test_an_oci_artifact_has_plain_layers_stored_once_and_says_what_is_in_them(shelf: Path) -> None:
    with registry.small() as (address, stored):
        sent(shelf, f"oci://{address}/models/tiny:v1")
        manifest = json.loads(stored["manifests", "v1"][0])
        layers = {x["digest"]: x for x in manifest["layers"]}
        sizes = {name: len(stored["blobs", name][0]) for name in layers}
    rows = reader.variants(shelf)
    fast = next(r for r in rows if r["point"]["name"] == "fast")
    notes = layers["sha256:" + fast["artifact"]]["annotations"]
    assert manifest["artifactType"] == "application/vnd.llmbuild.catalog.v1"
    assert sizes == {name: layer["size"] for name, layer in layers.items()}
    assert len(layers) == len(manifest["layers"])
    assert {notes["dev.llmbuild.target"], notes["dev.llmbuild.short.tpot_s"], notes["dev.llmbuild.runtime"]} == {
        "host",
        "0.01",
        fast["runtime"],
    }
    assert manifest["annotations"]["dev.llmbuild.models"] == "m"


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("oci://nowhere", "write oci://HOST/NAME"),
        ("oci://127.0.0.1:9/x/y:z", "cannot be reached"),
        ("nosuch://x", "nosuch"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_message(shelf: Path, tmp_path: Path, location: str, told: str) -> None:
    done = llmbuild("pull", location, "-C", tmp_path / "got")
    assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_published_and_pulled_variants_generate_the_same_tokens(built: Project, place: str, tmp_path: Path) -> None:
    sent(built.catalog, place)
    pulled(place, tmp_path / "got")
    here, there = load(built.catalog, "tiny"), load(tmp_path / "got", "tiny")
    assert there.row["artifact"] == here.row["artifact"]
    assert list(there.tokens([5, 6, 7], 12)) == list(here.tokens([5, 6, 7], 12))


def test_the_whole_way_by_command(built: Project, tmp_path: Path) -> None:
    runs = [
        llmbuild("publish", "tiny", tmp_path / "pub", "-C", built.catalog),
        llmbuild("pull", tmp_path / "pub", "-m", "tiny", "--slo", "tpot_s<=1", "-C", tmp_path / "got"),
        llmbuild("run", "tiny", "--slo", "tpot_s<=1", "--max-new-tokens", "3", "-C", tmp_path / "got"),
    ]
    assert [r.returncode for r in runs] == [0, 0, 0], [r.stderr for r in runs]
    assert "not needed here" in runs[1].stderr
