from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmbuild.catalog.exchange.publish import publish
from llmbuild.catalog.exchange.pull import Wanted, pull
from llmbuild.catalog.exchange.signing import make_keys
from llmbuild.catalog.schema import FILE, PUBLISHED_FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import InputError, LoadRefused
from llmbuild.runtime import lock, reader, trust
from llmbuild.runtime.model import load, pick
from llmbuild.spec.slo import parse_slo
from tests.conftest import llmbuild
from tests.support.synthetic import THREE, fill, toolchain

ANY = Wanted(parse_slo([], "tpot_s"))


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A folder with a catalog, two pairs of keys, and a publication signed with one of them."""
    fill(tmp_path / "shelf", THREE)
    for name in ("mine", "other"):
        make_keys(tmp_path / name)
    send(tmp_path, tmp_path / "mine.key")
    return tmp_path


def send(folder: Path, key: Path | None) -> None:
    catalog = Catalog(folder / "shelf")
    try:
        publish(catalog, (), str(folder / "pub"), key)
    finally:
        catalog.close()


def rewritten(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def manifest_of(folder: Path) -> Path:
    pointer = json.loads((folder / PUBLISHED_FILE).read_text())
    return reader.blob_path(folder, pointer["manifest"])


def test_a_signature_by_a_trusted_key_is_taken(signed: Path) -> None:
    rule = trust.policy(signed / "mine.pub")
    trust.require(signed / "pub", rule)
    assert pull(str(signed / "pub"), signed / "got", ANY, rule).signed_by == "mine.pub"
    trust.require(signed / "got", rule)


def test_one_of_several_trusted_keys_in_a_folder_is_enough(signed: Path) -> None:
    assert pull(str(signed / "pub"), signed / "got", ANY, trust.policy(signed)).signed_by == "mine.pub"


def test_another_key_is_refused_and_nothing_is_fetched(signed: Path) -> None:
    with pytest.raises(LoadRefused, match="by none of the trusted keys"):
        pull(str(signed / "pub"), signed / "got", ANY, trust.policy(signed / "other.pub"))
    assert not (signed / "got").exists()


def test_an_unsigned_publication_is_refused_where_keys_are_trusted_unless_allowed(signed: Path) -> None:
    send(signed, None)
    with pytest.raises(LoadRefused, match="llmbuild publish --sign"):
        trust.require(signed / "pub", trust.policy(signed / "mine.pub"))
    trust.require(signed / "pub", trust.policy(signed / "mine.pub", allow_unsigned=True))
    trust.require(signed / "pub", trust.policy(None))


def test_a_catalog_that_is_built_in_is_signed_by_nobody(signed: Path) -> None:
    with pytest.raises(LoadRefused, match="so it is unsigned"):
        load(signed / "shelf", "m", trust_keys=signed / "mine.pub")


def test_a_changed_manifest_database_pointer_or_signature_is_refused_before_it_is_opened(signed: Path) -> None:
    rule, pub = trust.policy(signed / "mine.pub"), signed / "pub"
    path, pointer = manifest_of(pub), (pub / PUBLISHED_FILE).read_bytes()
    manifest, database = path.read_bytes(), reader.database(pub)
    rows = database.read_bytes()
    rewritten(path, manifest.replace(b'"version":1', b'"version":2'))
    with pytest.raises(LoadRefused, match="manifest was changed"):
        trust.require(pub, rule)
    rewritten(path, manifest)
    rewritten(database, rows[:-1] + bytes([rows[-1] ^ 1]))
    with pytest.raises(LoadRefused, match="database was changed"):
        trust.require(pub, rule)
    rewritten(database, rows)
    body = json.loads(pointer)
    wrong = bytearray(base64.b64decode(body["signature"]))
    wrong[0] ^= 1
    rewritten(pub / PUBLISHED_FILE, json.dumps({**body, "signature": base64.b64encode(wrong).decode()}).encode())
    with pytest.raises(LoadRefused, match="made for other bytes"):
        trust.require(pub, rule)
    rewritten(pub / PUBLISHED_FILE, b"{}")
    with pytest.raises(LoadRefused, match="damaged"):
        trust.require(pub, rule)


def test_a_signature_of_one_manifest_is_not_good_for_another(signed: Path) -> None:
    old = json.loads((signed / "pub" / PUBLISHED_FILE).read_text())["signature"]
    fill(signed / "shelf", THREE, model="other")
    send(signed, None)
    pointer = json.loads((signed / "pub" / PUBLISHED_FILE).read_text())
    rewritten(signed / "pub" / PUBLISHED_FILE, json.dumps({**pointer, "signature": old}).encode())
    with pytest.raises(LoadRefused, match="made for other bytes"):
        trust.require(signed / "pub", trust.policy(signed / "mine.pub"))


def test_a_secret_key_is_only_its_owners_and_is_never_overwritten(signed: Path) -> None:
    assert (signed / "mine.key").stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="there already"):
        make_keys(signed / "mine")


@pytest.mark.parametrize(("data", "told"), [(b"no key", "not a public key"), (None, "No such file")])
def test_a_trusted_key_that_is_none_is_told(signed: Path, data: bytes | None, told: str) -> None:
    key = signed / "bad.pub"
    if data is not None:
        key.write_bytes(data)
    with pytest.raises(InputError, match=told):
        trust.require(signed / "pub", trust.policy(key))


def test_the_commands_take_the_policy_from_options_and_environment(signed: Path) -> None:
    good = llmbuild("pull", signed / "pub", "-C", signed / "got", LLMBUILD_TRUST=str(signed / "mine.pub"))
    bad = llmbuild("pull", signed / "pub", "-C", signed / "bad", "--trust", signed / "other.pub")
    assert (good.returncode, "signed by mine.pub" in good.stderr) == (0, True), good.stderr
    assert (bad.returncode, "none of the trusted keys" in bad.stderr) == (2, True), bad.stderr


def test_no_key_library_is_loaded_where_no_signature_is_asked_for(signed: Path) -> None:
    code = (
        "import sys; from llmbuild.runtime.model import pick; "
        f"pick({str(signed / 'pub')!r}, 'm'); print('cryptography' in sys.modules, 'sqlalchemy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# --- lock files and fallbacks ------------------------------------------------------------------------------------


def test_a_lock_opens_the_same_variant_whatever_is_best_now(signed: Path) -> None:
    made = pick(signed / "shelf", "m", objective="ttft_s")
    lock.write(made, signed / "llmbuild.lock")
    assert made.chosen is not None
    assert pick(signed / "shelf", "m", objective="tpot_s").chosen != made.chosen
    assert load(signed / "shelf", locked=signed / "llmbuild.lock").row["variant"] == made.chosen["variant"]


def test_a_lock_refuses_other_bytes_and_a_catalog_without_its_variant(signed: Path) -> None:
    path = signed / "llmbuild.lock"
    lock.write(pick(signed / "shelf", "m"), path)
    body = json.loads(path.read_text())
    fill(signed / "apart", THREE, tools=toolchain(compiler="9.9.9"))
    with pytest.raises(LoadRefused, match="is not in this catalog"):
        load(signed / "apart", locked=path)
    path.write_text(json.dumps({**body, "artifact": "0" * 64}))
    with pytest.raises(LoadRefused, match="pins artifact 0000"):
        load(signed / "shelf", locked=path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9}', "\x00", '{"version": 1, "model": 3}'])
def test_what_is_no_lock_file_is_told(signed: Path, text: str) -> None:
    (signed / "l").write_text(text)
    with pytest.raises(InputError, match="not a lock file"):
        load(signed / "shelf", locked=signed / "l")


def test_a_refused_variant_gives_way_to_the_next_only_when_asked(signed: Path) -> None:
    shelf = signed / "shelf"
    best = pick(shelf, "m").chosen
    assert best is not None
    rewritten(reader.blob_path(shelf, best["artifact"]), b"other")
    with pytest.raises(LoadRefused, match="was changed"):
        load(shelf, "m")
    opened = load(shelf, "m", fallback=True)
    verdicts = {c.row["point"]["name"] if "point" in c.row else "": c.reason for c in opened.pick.candidates}
    assert opened.row["point"]["name"] == "small"
    assert "was changed" in verdicts["fast"]
    assert "chosen   " + opened.row["variant"][:12] in opened.pick.explain()


def test_wrong_features_runtime_and_files_are_refused_with_the_command_that_mends_it(signed: Path) -> None:
    fill(signed / "old", THREE, tools=toolchain(runtime="1.2.3"))
    told = llmbuild("pick", "-C", signed / "old").stderr
    assert "pip install 'iree-base-runtime~=1.2.0'" in told
    assert "Traceback" not in told


def test_the_database_copy_for_other_clients_is_the_published_one(signed: Path) -> None:
    assert (signed / "pub" / FILE).read_bytes() == reader.database(signed / "pub").read_bytes()


@pytest.mark.parametrize("text", ["", ":", "{0}:", ":{0}", "{0}::{0}"])
def test_an_empty_part_of_a_list_of_keys_is_refused_and_is_not_the_current_folder(
    signed: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(signed)  # where keys lie that nobody named
    monkeypatch.setenv(trust.ENVIRONMENT, text.format(signed / "mine.pub"))
    with pytest.raises(InputError, match="part of it is empty"):
        trust.policy()
    with pytest.raises(InputError, match="name is empty"):
        trust.policy([""])
