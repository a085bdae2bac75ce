"""GGUF files as sources of a model: which files are refused and how it is told, and where they lie."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.frontend.gguf_header import read_header
from llmbuild.frontend.source import FoundModel, at_hand, examine, find_model, locate
from llmbuild.spec.recipe import ModelSource
from tests.conftest import llmbuild
from tests.support import folders, gguf_files
from tests.support.gguf_files import found, refused

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return gguf_files.write(tmp_path / "m.gguf")


def patched(path: Path, at: int, data: bytes) -> Path:
    body = bytearray(path.read_bytes())
    body[at : at + len(data)] = data
    path.write_bytes(body)
    return path


def test_what_is_no_gguf_file_is_told(tmp_path: Path, model: Path) -> None:
    assert "not a GGUF file: it does not begin with GGUF" in refused(patched(model, 0, b"GGML"))
    empty = tmp_path / "empty.gguf"
    empty.touch()
    assert "not a GGUF file" in refused(empty)
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "truncated: 8 bytes hold no whole header" in refused(tmp_path / "short.gguf")
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "a Git LFS pointer" in refused(pointer)
    assert "no such GGUF file" in refused(tmp_path / "absent.gguf")
    assert "a folder, not a GGUF file; it has empty.gguf, m.gguf" in refused(tmp_path)
    (tmp_path / "text").write_text("hello")
    assert "not a GGUF file" in refused(tmp_path / "text")


@pytest.mark.parametrize("version", [1, 4])
def test_another_version_is_told(model: Path, version: int) -> None:
    told = refused(patched(model, 4, struct.pack("<I", version)))
    assert told.endswith(f"version {version} of the GGUF format is not supported; taken are 2 and 3")


def test_version_2_is_read_as_version_3(model: Path) -> None:
    before = found(model)
    config = json.loads((before.folder / "config.json").read_text())
    after = found(patched(model, 4, struct.pack("<I", 2)))
    assert json.loads((after.folder / "config.json").read_text()) == config


def test_a_big_endian_file_is_told(tmp_path: Path) -> None:
    keys = gguf_files.metadata(gguf_files.configuration(), "llama")
    path = gguf_files.write_file(tmp_path / "m.gguf", "llama", keys, {}, endianess=gguf.GGUFEndian.BIG)
    assert "a big-endian GGUF file" in refused(path)


def test_a_part_of_a_split_model_is_told(tmp_path: Path, model: Path) -> None:
    part = tmp_path / "m-00001-of-00003.gguf"
    shutil.copy(model, part)
    assert "one part of a model that is split over 00003 files: join them" in refused(part)
    split = gguf_files.write(tmp_path / "s.gguf", keys={"split.count": 2, "split.no": 0})
    assert "one part of a model that is split over 2 files" in refused(split)
    shutil.copy(model, tmp_path / "m-00001-of-00001.gguf")
    assert found(tmp_path / "m-00001-of-00001.gguf").digest == found(model).digest


def test_a_file_that_is_cut_anywhere_is_told(tmp_path: Path, model: Path) -> None:
    body = model.read_bytes()
    begin = min(tensor.begin for tensor in read_header(model).tensors.values())
    cuts = [*range(24, begin, 37), begin, begin + 100, len(body) - 1]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(body[:cut])
        assert "this GGUF file is truncated or corrupt: " in refused(tmp_path / "cut.gguf"), cut
    (tmp_path / "longer.gguf").write_bytes(body + b"\0" * 64)
    assert found(tmp_path / "longer.gguf").weights == tmp_path / "longer.gguf"


def test_a_changed_byte_of_the_header_never_breaks_the_reader(tmp_path: Path, model: Path) -> None:
    body, path, drawn = model.read_bytes(), tmp_path / "odd.gguf", random.Random(0)
    begin = min(tensor.begin for tensor in read_header(model).tensors.values())
    refusals = 0
    for _ in range(400):
        odd = bytearray(body)
        odd[drawn.randrange(4, begin)] = drawn.randrange(256)
        path.write_bytes(odd)
        try:
            examine(path, False, 64)
        except InputError:
            refusals += 1
    assert 100 < refusals < 400


@pytest.mark.parametrize(
    ("dims", "kind", "offset", "told"),
    [
        ((32,), 99, 0, "has the unknown type 99"),
        ((32,), 4, 0, "has the unknown type 4"),
        ((31,), 8, 0, "rows of 31 weights, no multiple of Q8_0's 32"),
        ((0,), 0, 0, "has the shape [0]"),
        ((1 << 40, 1 << 40), 0, 0, "has the shape"),
        ((32,), 0, 4, "begins at byte 4 of the data, no multiple of 32"),
        ((32,), 0, 1 << 40, "ends at byte"),
        ((1, 1, 1, 1, 1), 0, 0, "has 5 dimensions"),
    ],
)
def test_tables_that_contradict_the_file_are_told(
    tmp_path: Path, dims: tuple[int, ...], kind: int, offset: int, told: str
) -> None:
    table = struct.pack("<Q1sI", 1, b"a", len(dims)) + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + table + b"\0" * 256)
    assert told in refused(path)


def test_tensors_that_overlap_or_are_there_twice_are_told(tmp_path: Path) -> None:
    def write(*tensors: tuple[bytes, int]) -> Path:
        table = b"".join(struct.pack("<Q1sIQIQ", 1, name, 1, 32, 0, offset) for name, offset in tensors)
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + table + b"\0" * 512)
        return tmp_path / "m.gguf"

    assert 'tensors "a" and "b" overlap' in refused(write((b"a", 0), (b"b", 64)))
    assert 'tensor "a" is there twice' in refused(write((b"a", 0), (b"a", 128)))


def test_the_header_is_what_the_package_reads(model: Path) -> None:
    header, theirs = read_header(model), gguf.GGUFReader(model)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in header.metadata.items()} == fields
    assert {
        t.name: (t.tensor_type.name, tuple(map(int, t.shape[::-1])), int(t.data_offset), int(t.n_bytes))
        for t in theirs.tensors
    } == {t.name: (t.kind, t.shape, t.begin, t.size) for t in header.tensors.values()}


# --- what is found, and by what name -------------------------------------------------------------------------------


def test_a_file_is_found_and_named_by_its_content(tmp_path: Path, model: Path) -> None:
    first = found(model)
    assert (first.weights, first.location) == (model, model)
    assert json.loads((first.folder / "config.json").read_text()) == examine(model, False).config
    moved = shutil.move(model, tmp_path / "other.gguf")
    assert found(moved) == FoundModel(first.folder, first.digest, None, first.notes, weights=Path(moved))
    body = bytearray(Path(moved).read_bytes())
    body[-1] ^= 1
    Path(moved).write_bytes(body)
    assert found(moved).digest != first.digest


def test_examine_takes_what_locate_gives(model: Path) -> None:
    assert locate(str(model), False) == model
    assert at_hand(str(model), False) == model
    made = examine(locate(str(model), False), False, 64)
    assert (made.files.weights, made.is_gguf, made.files.pickled) == ((model,), True, False)
    bare = model.rename(model.with_suffix(""))
    assert examine(locate(str(bare), False), False, 64).is_gguf


def test_a_folder_of_safetensors_is_no_gguf(tmp_path: Path) -> None:
    made = find_model(ModelSource("huggingface", str(folders.write(tmp_path / "m"))), 64)
    assert (made.weights, made.location) == (None, tmp_path / "m")
    assert not examine(tmp_path / "m", False).is_gguf


def test_random_weights_take_the_shape_alone(tmp_path: Path, model: Path) -> None:
    drawn = found(model, random_init=True, seed=3)
    assert (drawn.weights, drawn.location) == (None, drawn.folder)
    assert drawn.digest != found(model, random_init=True, seed=4).digest
    folder = find_model(ModelSource("huggingface", str(drawn.folder), True, 3), 64)
    assert folder.digest == drawn.digest
    odd = gguf_files.write(tmp_path / "odd.gguf", extra={"blk.0.ffn_gate_exps.weight": np.zeros(32, np.float32)})
    assert found(odd, random_init=True, seed=3).digest == drawn.digest


def test_nothing_heavy_is_loaded_to_find_a_model(model: Path) -> None:
    code = (
        "import sys; from llmbuild.frontend.source import find_model; from llmbuild.spec.recipe import ModelSource\n"
        f"find_model(ModelSource('gguf', {str(model)!r}), 64)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- files of packages ---------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a model, which must not be imported."""
    place = tmp_path / "site" / "tiny_model_package"
    (place / "sub").mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('imported')\n")
    shutil.copy(model, place / "tiny.gguf")
    shutil.copy(model, place / "sub" / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return place


def test_a_file_of_a_package_is_found_without_importing_it(package: Path, model: Path) -> None:
    for name in ("tiny.gguf", "sub/tiny.gguf"):
        made = found(f"package:tiny_model_package/{name}")
        assert (made.weights, made.digest) == (package / name, found(model).digest)
    assert at_hand("package:tiny_model_package/tiny.gguf", False) == package / "tiny.gguf"
    assert "tiny_model_package" not in sys.modules


def test_a_package_that_is_not_there_is_told_with_what_to_install(package: Path) -> None:
    told = refused("package:no_such_models/m.gguf")
    assert told == "package:no_such_models/m.gguf: no package no_such_models is installed: pip install no-such-models"
    told = refused("package:tiny_model_package/other.gguf")
    assert told.endswith("the installed package tiny_model_package has no file other.gguf; it has tiny.gguf")


# --- the cache -----------------------------------------------------------------------------------------------------


def test_small_files_are_written_once_and_again_when_they_were_changed(cache: Path, model: Path) -> None:
    folder = found(model).folder
    assert folder.parent == cache / "llmbuild" / "gguf"
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    config = folder / "config.json"
    before, stamp = config.read_bytes(), config.stat().st_mtime_ns
    assert found(model).folder == folder
    assert config.stat().st_mtime_ns == stamp
    config.write_bytes(before.replace(b"llama", b"qwen2"))
    assert found(model).folder == folder
    assert config.read_bytes() == before
    (folder / "tokenizer_config.json").unlink()
    found(model)
    assert (folder / "tokenizer_config.json").is_file()
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_factors_belong_to_the_name_of_a_folder(tmp_path: Path) -> None:
    one, four = (np.full(4, value, np.float32) for value in (1, 4))
    paths = [
        gguf_files.write(tmp_path / f"{n}.gguf", extra={"rope_freqs.weight": v}) for n, v in enumerate((one, four))
    ]
    assert found(paths[0]).folder != found(paths[1]).folder


def _find(path: str) -> str:
    return str(found(path).folder)


def test_many_processes_make_one_folder(cache: Path, model: Path) -> None:
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        made = set(pool.map(_find, [str(model)] * 12))
    (folder,) = made
    assert sorted(path.name for path in Path(folder).parent.iterdir()) == [Path(folder).name]


def test_a_home_that_cannot_be_written_is_told_with_what_to_set(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    told = refused(model)
    assert str(tmp_path / "file") in told
    assert told.endswith("set XDG_CACHE_HOME to a folder that can be")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert found(model).folder.parent == tmp_path / "home" / ".cache" / "llmbuild" / "gguf"


# --- recipes -------------------------------------------------------------------------------------------------------


def test_a_recipe_of_a_gguf_file_is_listed_and_planned(cache: Path, tmp_path: Path, model: Path) -> None:
    text = "model: {gguf: m.gguf}\nworkloads: [{name: short, prompt: 8, output: 8}]\n"
    (tmp_path / "recipes").mkdir()
    model.rename(tmp_path / "recipes" / "m.gguf")
    (tmp_path / "recipes" / "a.yaml").write_text(text)
    (tmp_path / "recipes" / "b.yaml").write_text(text.replace("m.gguf", "package:no_such_models/m.gguf"))
    rows = json.loads(llmbuild("recipes", tmp_path / "recipes", "--json").stdout)
    assert [row["state"] for row in rows] == [
        "ok",
        "package:no_such_models/m.gguf: no package no_such_models is installed: pip install no-such-models",
    ]
    done = llmbuild("build", "-n", tmp_path / "recipes" / "a.yaml", "-C", tmp_path / "catalog")
    assert done.returncode == 0, done.stderr
    assert "the file has no tokenizer: texts cannot be read" in done.stderr + done.stdout
    assert cache.is_dir()
