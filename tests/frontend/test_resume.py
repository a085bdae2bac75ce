"""Imports that are interrupted: the next one in the same folder goes on, and ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.frontend import program, writing
from llmbuild.frontend.check import Check
from llmbuild.frontend.checkpoint import Model
from llmbuild.frontend.program import ask, import_model
from llmbuild.frontend.weights import Source
from llmbuild.spec.program import (
    ABI_FILE,
    CHECK_FILE,
    MODULE_FILE,
    PARAMETERS_FILE,
    SIZES_FILE,
    TRUTH_FILE,
    ImportJob,
    ImportResult,
)
from tests.conftest import shared
from tests.frontend.conftest import AVX2
from tests.support import folders
from tests.support.sweeps import sweep

LAYERS, CONTEXT = 5, 32
OWN = {"weight_format": "int8", "layout": "packed", "kernel": "own"}
GPTQ, SCALED = {"quantization": "gptq"}, {"scaling": "activation"}
FOUR = {"weight_format": "int4_g32", "head_format": "int8"}
CHOICES: dict[str, dict[str, str]] = {
    "plain": {},
    "own": OWN,
    "gptq": {**FOUR, **GPTQ},
    "scaled": {**FOUR, **SCALED},
    "both": {**FOUR, "layout": "packed", **GPTQ, **SCALED},
    "own gptq": {**OWN, **GPTQ},
    "own scaled": {**OWN, "weight_format": "int4_g32", "head_format": "int8", **SCALED},
    "own both": {**OWN, **GPTQ, **SCALED},
    "mixed": {**FOUR, "mixed": "sensitive", **GPTQ},
}


class Stopped(Exception):
    """What ends an import in a test."""


@dataclass(frozen=True)
class Begun:
    """An import that was never interrupted, and its job with all that earlier imports would have left for it."""

    job: ImportJob
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        """What it returned, as plain data."""
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return found


def whole(factory: pytest.TempPathFactory, name: str) -> Begun:
    """Return the import of some choices, made once for all tests."""
    choices = CHOICES[name]

    def model(folder: Path) -> None:
        folders.write(folder, num_hidden_layers=LAYERS)
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 64, (3, 24)))
        ask(ImportJob(str(folder), CONTEXT), folder)

    source = shared(factory, "resumed-model", model)
    known = {"calibration": str(source / "tokens.npy")} if {"quantization", "scaling", "mixed"} & {*choices} else {}
    features = AVX2 if "kernel" in choices else ()
    job = ImportJob(str(source), CONTEXT, choices=tuple(choices.items()), features=features, **known)
    job = replace(job, truth=str(source / TRUTH_FILE))

    def make(folder: Path) -> None:
        result = import_model(job, folder)
        (folder / "result.json").write_text(json.dumps(digest.plain(result)))

    folder = shared(factory, f"resumed-{name.replace(' ', '-')}", make)
    paths = {"module": str(folder / MODULE_FILE), "sizes": str(folder / SIZES_FILE)}
    return Begun(replace(job, key="a key", **paths), folder)


@pytest.fixture(params=sweep(CHOICES, ("plain", "own", "own both")))
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    return whole(tmp_path_factory, request.param)


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    return whole(tmp_path_factory, "plain")


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    return whole(tmp_path_factory, "own")


@pytest.fixture(autouse=True)
def always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SAVE_S", 0.0)


def stopping(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Return a function that raises at its call number `at`, from 0 on."""
    calls = count()

    def called(*given: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise Stopped
        return real(*given, **named)

    return called


def interrupt(job: ImportJob, out: Path, owner: Any, name: str, at: int) -> None:
    """Begin an import that is ended by call number `at` of a function."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, stopping(getattr(owner, name), at))
        with pytest.raises(Stopped):
            import_model(job, out)


def checked(result: ImportResult, begun: Begun, out: Path, resumed: int | None = None) -> int:
    """See that an import is the one that was never interrupted; return how many layers it found there."""
    assert digest.plain(replace(result, resumed=0)) == begun.result
    for name in (MODULE_FILE, PARAMETERS_FILE, ABI_FILE):
        assert (out / name).read_bytes() == (begun.folder / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} <= {MODULE_FILE, PARAMETERS_FILE, CHECK_FILE, ABI_FILE, SIZES_FILE}
    assert resumed is None or result.resumed == resumed
    return result.resumed


def test_an_import_goes_on_with_the_layers_that_were_finished(begun: Begun, tmp_path: Path) -> None:
    interrupt(begun.job, tmp_path, Check, "layer", 2)
    result = import_model(begun.job, tmp_path)
    checked(result, begun, tmp_path, resumed=2)


def test_an_import_that_is_stopped_at_every_layer_is_finished_in_the_end(begun: Begun, tmp_path: Path) -> None:
    for _ in range(LAYERS):
        interrupt(begun.job, tmp_path, Check, "layer", 1)  # one more layer each time
        if (tmp_path / "parameters.npz").is_file() and int(
            np.load(tmp_path / "parameters.npz")["layers"]
        ) == LAYERS - 1:
            break
    checked(import_model(begun.job, tmp_path), begun, tmp_path, resumed=LAYERS - 1)


@pytest.mark.parametrize("at", [0, 3, 40, 60])
def test_an_import_that_ends_while_weights_are_read_goes_on(own: Begun, tmp_path: Path, at: int) -> None:
    """In a thread that fills a layer while others are at work."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        real = Source.encoded_for
        patched.setattr(Source, "encoded_for", lambda *given: (calls.append(given[2]), real(*given))[1])
        import_model(replace(own.job, key=""), tmp_path / "counted")
    assert len(calls) > 36, "seven matrices of each layer, and the head"
    at = min(at, len(calls) - 1)
    interrupt(own.job, tmp_path / "out", Source, "encoded_for", at)
    found = checked(import_model(own.job, tmp_path / "out"), own, tmp_path / "out")
    assert found == 0 or at >= 40, "no layer is whole before"


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Check, "head"), (Check, "keep"), (Check, "data"), (np, "savez"), (writing.Writing, "forget")],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_an_import_that_ends_behind_its_layers_makes_none_of_them_again(
    plain: Begun, tmp_path: Path, owner: Any, name: str
) -> None:
    interrupt(plain.job, tmp_path, owner, name, LAYERS if name == "savez" else 0)  # once for each layer before
    checked(import_model(plain.job, tmp_path), plain, tmp_path, resumed=LAYERS)


def test_an_import_of_another_key_or_without_one_does_not_go_on(plain: Begun, tmp_path: Path) -> None:
    for key in ("another key", ""):
        interrupt(plain.job, tmp_path / "out", Check, "layer", 3)
        other = import_model(replace(plain.job, key=key), tmp_path / "out")
        checked(other, plain, tmp_path / "out", resumed=0)


def test_without_a_key_nothing_is_left_to_go_on_with(plain: Begun, tmp_path: Path) -> None:
    job = replace(plain.job, key="")
    interrupt(job, tmp_path, Check, "layer", 3)
    checked(import_model(job, tmp_path), plain, tmp_path, resumed=0)


def test_other_choices_in_the_same_folder_begin_anew(plain: Begun, own: Begun, tmp_path: Path) -> None:
    interrupt(own.job, tmp_path, Check, "layer", 3)
    checked(import_model(plain.job, tmp_path), plain, tmp_path, resumed=0)


def test_a_layer_whose_bytes_changed_is_made_again(plain: Begun, tmp_path: Path) -> None:
    interrupt(plain.job, tmp_path, Check, "layer", 3)
    path = tmp_path / PARAMETERS_FILE
    data = bytearray(path.read_bytes())
    data[plain_offset(path, "model.layers.1.mlp.up_proj.matrix.data")] ^= 1
    path.write_bytes(data)
    checked(import_model(plain.job, tmp_path), plain, tmp_path, resumed=0)


def plain_offset(path: Path, name: str) -> int:
    from llmbuild.transform.archive import Layout
    from tests.support.artifact import archived

    sizes = {tensor: len(data) for tensor, data in archived(path).items()}
    return Layout.of(sizes).places[name] + 17


@pytest.mark.parametrize("spoil", [b"", b"PK", b"PK\x03\x04 half of it"], ids=["empty", "two bytes", "cut short"])
def test_a_record_that_a_crash_has_spoiled_means_to_begin_anew(plain: Begun, tmp_path: Path, spoil: bytes) -> None:
    interrupt(plain.job, tmp_path, Check, "layer", 3)
    (tmp_path / "parameters.npz").write_bytes(spoil)
    checked(import_model(plain.job, tmp_path), plain, tmp_path, resumed=0)


def test_a_record_cut_short_or_with_other_bytes_means_to_begin_anew(plain: Begun, tmp_path: Path) -> None:
    interrupt(plain.job, tmp_path, Check, "layer", 3)
    record, draw = tmp_path / "parameters.npz", random.Random(0)
    intact, archive = record.read_bytes(), (tmp_path / PARAMETERS_FILE).read_bytes()
    journal = (tmp_path / "parameters.journal").read_bytes()
    for _ in range(6):
        data = bytearray(intact[: draw.randrange(1, len(intact) + 1)])
        data[draw.randrange(len(data))] ^= 1 + draw.randrange(255)
        record.write_bytes(data)
        (tmp_path / PARAMETERS_FILE).write_bytes(archive)
        (tmp_path / "parameters.journal").write_bytes(journal)
        checked(import_model(plain.job, tmp_path), plain, tmp_path)


def test_records_are_seconds_apart(plain: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SAVE_S", 3600.0)
    interrupt(plain.job, tmp_path, Check, "layer", 3)
    assert not (tmp_path / "parameters.npz").exists()
    checked(import_model(plain.job, tmp_path), plain, tmp_path, resumed=0)


CHILD = """
import sys, time
from llmbuild.frontend import check, writing
from llmbuild.frontend.__main__ import main
writing.SAVE_S = 0.0
run = check.Check.layer
def slowly(self, index, kept):
    run(self, index, kept)
    print(index, flush=True)
    time.sleep(0.15)
check.Check.layer = slowly
sys.exit(main([sys.argv[1]]))
"""


def child(job: ImportJob, folder: Path) -> subprocess.Popen[str]:
    file = folder / "job.json"
    body = {"verb": "import", "out": str(folder / "out"), **digest.plain(job), "choices": dict(job.choices)}
    file.write_text(json.dumps(body))
    command = [sys.executable, "-c", CHILD, str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", sweep(("own both", "plain"), ("own both",)))
def test_a_process_that_is_killed_at_any_moment_is_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, name: str
) -> None:
    begun, draw = whole(tmp_path_factory, name), random.Random()
    (tmp_path / "out").mkdir()
    layers, wait = draw.randint(2, LAYERS - 1), draw.uniform(0, 0.2)
    first = child(begun.job, tmp_path)
    assert first.stdout is not None
    for _ in range(layers):
        assert first.stdout.readline(), first.communicate()[1]
    sleep(wait)
    first.kill()
    first.communicate()
    assert not (tmp_path / "out" / "result.json").exists()
    second = child(begun.job, tmp_path)
    assert second.wait(300) == 0, second.communicate()[1]
    second.communicate()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert LAYERS > result["resumed"] >= layers - 1 > 0, (layers, wait)
    assert {**result, "resumed": 0} == begun.result, (layers, wait)


# --- what ends an import for good ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sweep(("plain", "own", "gptq"), ("plain", "own")))
@pytest.mark.parametrize("tensor", ["model.layers.3.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers_are_named_from_the_stream(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tensor: str
) -> None:
    begun, real = whole(tmp_path_factory, name), Model.rows

    def spoiled(self: Model, asked: str, start: int, stop: int) -> np.ndarray:
        rows = self.stored.rows
        if self._alias.get(asked, asked) != tensor:
            return real(self, asked, start, stop)

        class Spoiled:
            shapes = self.stored.shapes

            @staticmethod
            def rows(own: str, begin: int, end: int) -> np.ndarray:
                found = rows(own, begin, end).copy()
                if begin <= 6 < end:
                    found[6 - begin, 2] = np.nan
                return found

        other = Model(Spoiled(), self.name, self.tied)  # type: ignore[arg-type]
        return real(other, asked, start, stop)

    monkeypatch.setattr(Model, "rows", spoiled)
    with pytest.raises(InputError, match=f"{tensor.split('.weight')[0]}|lm_head") as caught:
        import_model(begun.job, tmp_path)
    assert "has 1 values that are NaN or infinite" in str(caught.value)


def test_a_full_disk_is_told_and_leaves_no_archive(
    plain: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            import_model(plain.job, tmp_path)
    assert not (tmp_path / PARAMETERS_FILE).exists()
    checked(import_model(plain.job, tmp_path), plain, tmp_path, resumed=0)


def test_what_a_model_says_is_asked_once(plain: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth that was given is what the check data of exact programs holds."""
    monkeypatch.setattr(program, "truth", lambda *_: pytest.fail("it was there"))
    import_model(plain.job, tmp_path)
    with np.load(tmp_path / CHECK_FILE) as check, np.load(plain.job.truth) as truth:
        assert np.array_equal(check["logits"], truth["logits"])
