"""Drafts of archives: what was finished is kept for the same key and layout alone, and where its bytes are right."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from llmbuild.transform.archive import Layout
from llmbuild.transform.stream import Draft, Piece, Pipeline, Region, Unit, whole
from tests.support.artifact import archived

COUNT, SIZE = 7, 1000
LAYOUT = Layout.of({f"t{i}": SIZE for i in range(COUNT)})
HELD = {f"t{i}": np.random.default_rng(i).integers(1, 255, SIZE, np.uint8) for i in range(COUNT)}


def unit(number: int, made: list[int] | None = None) -> Unit:
    """Return the unit of one tensor, in ten pieces; `made` collects the units that a task was run of."""
    name = f"t{number}"

    def task(at: int) -> Iterator[Piece]:
        if made is not None:
            made.append(number)
        yield Piece(name, at, HELD[name][at : at + 100])

    return Unit(name, (Region(name, 0, SIZE),), tuple(lambda at=at: task(at) for at in range(0, SIZE, 100)))


UNITS = [unit(i) for i in range(COUNT)]


def write(path: Path, key: str, last: int, layout: Layout = LAYOUT) -> list[int]:
    """Write the units before `last` that an earlier run has not finished, as an import does; return which."""
    draft = Draft(path, layout, key)
    left = [i for i in range(last) if not draft.has(UNITS[i])]
    pipeline = Pipeline(draft, 2)
    pipeline.finish(pipeline.begin([UNITS[i] for i in left]))
    pipeline.close()
    draft.close()
    return left


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An archive in the making, of which four units are finished."""
    assert write(tmp_path / "a.irpa", "key", 4) == [0, 1, 2, 3]
    return tmp_path / "a.irpa"


def test_a_second_run_with_the_same_key_goes_on(path: Path) -> None:
    assert write(path, "key", COUNT) == [4, 5, 6]
    assert archived(path) == {name: data.tobytes() for name, data in HELD.items()}
    assert write(path, "key", COUNT) == []


def test_forgotten_means_made_again_but_the_archive_stays(path: Path) -> None:
    write(path, "key", COUNT)
    draft, before = Draft(path, LAYOUT, "key"), path.read_bytes()
    draft.close()
    draft.forget()
    draft.forget()
    assert ([each.name for each in path.parent.iterdir()], path.read_bytes()) == (["a.irpa"], before)
    assert write(path, "key", COUNT) == [*range(COUNT)]


@pytest.mark.parametrize("key", ["another", ""])
def test_another_key_or_none_begins_anew(path: Path, key: str) -> None:
    assert write(path, key, 2) == [0, 1]
    assert not any(path.read_bytes()[LAYOUT.places["t2"] :]), "what the other key had written is gone"


def test_without_a_key_nothing_is_gone_on_with(tmp_path: Path) -> None:
    assert write(tmp_path / "a.irpa", "", 2) == write(tmp_path / "a.irpa", "", 2) == [0, 1]


@pytest.mark.parametrize("sizes", [{"t0": SIZE + 1}, {"t7": SIZE}], ids=["a size", "one more"])
def test_another_layout_begins_anew(path: Path, sizes: dict[str, int]) -> None:
    layout = Layout.of({**dict(LAYOUT.sizes), **sizes})
    assert write(path, "key", 4, layout) == [0, 1, 2, 3]
    assert path.stat().st_size == layout.file_bytes


def test_an_archive_without_its_journal_and_a_journal_without_its_archive_begin_anew(path: Path) -> None:
    path.with_suffix(".journal").unlink()
    assert write(path, "key", 4) == [0, 1, 2, 3]
    path.unlink()
    assert write(path, "key", 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("at", [0, 500, SIZE - 1])
def test_a_unit_whose_bytes_are_others_is_made_again(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[LAYOUT.places["t2"] + at] ^= 1
    path.write_bytes(data)
    assert write(path, "key", COUNT) == [2, 4, 5, 6]
    assert archived(path) == {name: data.tobytes() for name, data in HELD.items()}


def test_an_archive_that_was_cut_short_is_made_again_from_there(path: Path) -> None:
    write(path, "key", COUNT)
    os.truncate(path, LAYOUT.places["t5"] + 10)
    assert write(path, "key", COUNT) == [5, 6]
    assert archived(path) == {name: data.tobytes() for name, data in HELD.items()}


def test_a_journal_that_ends_in_half_a_line_loses_that_line_alone(path: Path) -> None:
    journal = path.with_suffix(".journal")
    whole_journal = journal.read_bytes()
    begin = whole_journal[:-1].rindex(b"\n") + 1
    last = int(json.loads(whole_journal[begin:])["unit"].removeprefix("t"))  # units end in any order
    for end in (begin + 1, begin + 7, len(whole_journal) - 2):
        journal.write_bytes(whole_journal[:end])
        assert write(path, "key", 4) == [last], end
        assert write(path, "key", 4) in ([], [last]), "a line behind half a line may be lost with it"


def test_a_journal_cut_anywhere_or_spoiled_gives_the_same_archive(path: Path) -> None:
    journal, draw = path.with_suffix(".journal"), random.Random(0)
    intact = journal.read_bytes()
    for _ in range(40):
        data = bytearray(intact[: draw.randrange(len(intact) + 1)])
        for _ in range(draw.randrange(3) if data else 0):
            data[draw.randrange(len(data))] = draw.randrange(256)
        journal.write_bytes(data)
        write(path, "key", COUNT)
        assert archived(path) == {name: data.tobytes() for name, data in HELD.items()}


def test_a_disk_that_is_full_is_told_before_anything_is_made_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, begin: int, size: int) -> None:
        os.pwrite(file, b"what there was room for", 0)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Draft(tmp_path / "a.irpa", LAYOUT, "key")
    assert list(tmp_path.iterdir()) == []


def test_room_is_taken_for_the_whole_archive_when_it_begins(tmp_path: Path) -> None:
    large = Layout.of({"t": 1 << 22})
    Draft(tmp_path / "a.irpa", large).close()
    assert (tmp_path / "a.irpa").stat().st_blocks * 512 >= large.file_bytes


def test_what_a_task_raises_is_raised_and_its_unit_is_not_recorded(tmp_path: Path) -> None:
    def bad() -> Iterator[Piece]:
        yield Piece("t1", 0, HELD["t1"][:100])
        raise ValueError("no numbers")

    draft = Draft(tmp_path / "a.irpa", LAYOUT, "key")
    pipeline = Pipeline(draft, 2)
    faulty = Unit("t1", (Region("t1", 0, SIZE),), (bad,))
    begun = pipeline.begin([UNITS[0], faulty, UNITS[2]])
    with pytest.raises(ValueError, match="no numbers"):
        pipeline.finish(begun)
    pipeline.close()
    draft.close()
    draft = Draft(tmp_path / "a.irpa", LAYOUT, "key")
    assert [draft.has(each) for each in UNITS[:2]] == [True, False], "another unit may have ended or not"
    draft.close()


def test_a_piece_that_would_lie_on_the_next_tensor_is_refused(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "a.irpa", LAYOUT)
    with pytest.raises(ValueError, match="t1: bytes beyond the 1000 that it has"):
        draft.write(Piece("t1", 901, HELD["t1"][:100]))
    draft.write(Piece("t1", 900, HELD["t1"][900:]))
    draft.close()
    assert not any((tmp_path / "a.irpa").read_bytes()[LAYOUT.places["t2"] :])


def test_tasks_run_at_the_same_time(tmp_path: Path) -> None:
    meet = Barrier(3, timeout=60)

    def task(at: int) -> Iterator[Piece]:
        meet.wait()  # passes once all three are here
        yield Piece("t0", at, HELD["t0"][at : at + 500])

    draft = Draft(tmp_path / "a.irpa", LAYOUT)
    pipeline = Pipeline(draft, 3)
    tasks = (lambda: task(0), lambda: task(500))
    begun = pipeline.begin([Unit("t0", (Region("t0", 0, SIZE),), tasks)])
    meet.wait()
    pipeline.finish(begun)
    pipeline.close()
    assert draft.has(UNITS[0]) is False, "only what an earlier run finished is there"
    draft.close()
    assert archived(tmp_path / "a.irpa")["t0"] == HELD["t0"].tobytes()


def test_units_that_have_not_begun_are_left_out_at_the_end(tmp_path: Path) -> None:
    made: list[int] = []
    draft = Draft(tmp_path / "a.irpa", LAYOUT)
    held, meet = [], Barrier(2, timeout=60)

    def first() -> Iterator[Piece]:
        meet.wait()
        meet.wait()
        held.append(1)
        yield Piece("t0", 0, HELD["t0"])

    pipeline = Pipeline(draft, 1)
    pipeline.begin([Unit("t0", (Region("t0", 0, SIZE),), (first,)), *(unit(i, made) for i in range(1, COUNT))])
    meet.wait()
    pipeline._pool.shutdown(wait=False, cancel_futures=True)
    meet.wait()
    pipeline.close()
    draft.close()
    assert (held, made) == ([1], [])


def test_small_tensors_are_one_unit(tmp_path: Path) -> None:
    arrays = {"t1": HELD["t1"].view(np.float32), "t3": HELD["t3"].reshape(10, 100)[:, ::1]}
    draft = Draft(tmp_path / "a.irpa", LAYOUT, "key")
    pipeline, small = Pipeline(draft, 1), whole("small", arrays)
    pipeline.finish(pipeline.begin([small]))
    pipeline.close()
    draft.close()
    again = Draft(tmp_path / "a.irpa", LAYOUT, "key")
    assert again.has(small)
    again.close()
    held = archived(tmp_path / "a.irpa")
    assert [held[name] for name in ("t1", "t3")] == [HELD[name].tobytes() for name in ("t1", "t3")]
