"""Chats that a model writes for a build: kept in the catalog, continued where they were ended, with a limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmbuild.build import chats
from llmbuild.build.chats import Chats
from llmbuild.build.events import Event
from llmbuild.build.price import weights
from llmbuild.catalog.writer import IMPORTS, Catalog
from llmbuild.errors import InputError
from llmbuild.frontend import transcript
from llmbuild.frontend.files import CONFIG
from llmbuild.frontend.transcript import TRANSCRIPT_FILE, Transcript
from llmbuild.process.child import Limits
from llmbuild.profiler.calibration import Chats as Asked
from llmbuild.spec.model import read_facts
from llmbuild.spec.variant import Failure
from tests.support import folders, quick

ASKED = Asked(((1, 2), (3,)), windows=2, length=24)
ENDED = Failure("import", "python ran past 601 s", "", "", lasting=False)
WRITTEN = np.arange(48).reshape(2, 24)


class Model:
    """A model that writes `tokens` of its chats and then ends as it is told: with all, a failure or an error."""

    def __init__(self, tokens: int, end: Failure | InputError | None = None) -> None:
        self.tokens, self.end = tokens, end

    def run(self, request: Mapping[str, object], folder: Path, limits: Limits) -> dict[str, object] | Failure:
        """Do what the child process would."""
        assert (request["verb"], request["windows"], request["length"]) == ("chats", 2, 24)
        Transcript(folder / TRANSCRIPT_FILE, str(request["key"])).keep([[7] * self.tokens])
        if isinstance(self.end, InputError):
            raise self.end
        if self.end is not None:
            return self.end
        np.save(folder / "chats.npy", WRITTEN)
        return {"chats": "chats.npy"}


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog")
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "SAVE_S", 0.0)


def asked_of(model: Model, catalog: Catalog, said: list[Event] | None = None) -> np.ndarray | Failure:
    tell = [].append if said is None else said.append
    job = quick.job_of(quick.Asked(), catalog.folder / "inputs")
    return Chats(job, catalog, model.run, tell).tokens(ASKED, lambda _: False)


@pytest.fixture(autouse=True)
def sized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = read_facts(folders.write(tmp_path / "model", num_hidden_layers=1) / CONFIG)
    monkeypatch.setattr(chats, "read_facts", lambda _: facts)


def left(catalog: Catalog) -> list[str]:
    return [path.name for path in (catalog.folder / IMPORTS).iterdir()]


def test_chats_that_were_ended_say_how_far_they_are_and_go_on(catalog: Catalog) -> None:
    said: list[Event] = []
    found = asked_of(Model(10, ENDED), catalog, said)
    assert isinstance(found, Failure)
    assert found.reason == (
        "python ran past 601 s; 10 of 48 tokens of chats are kept, and the next build goes on with them: idle cores, "
        "or a smaller share of `chats` in the recipe, take less time"
    )
    assert len(left(catalog)) == 1
    again = asked_of(Model(48), catalog, said)
    assert not isinstance(again, Failure)
    assert (again.tolist(), left(catalog)) == (WRITTEN.tolist(), [])
    begun = "the model writes chats of 48 tokens to calibrate on"
    notes = [event.text for event in said if event.step == "note"]
    assert notes == [begun, f"{begun}: 10 were there, of a run that was ended"]


def test_chats_are_not_written_again(catalog: Catalog) -> None:
    first, second = asked_of(Model(48), catalog), asked_of(Model(0, InputError("asked again")), catalog)
    assert not isinstance(first, Failure) and not isinstance(second, Failure)
    assert first.tolist() == second.tolist()


def test_what_cannot_be_written_leaves_no_folder(catalog: Catalog) -> None:
    assert asked_of(Model(10, replace(ENDED, lasting=True)), catalog) == replace(ENDED, lasting=True)
    assert left(catalog) == []
    with pytest.raises(InputError, match="not of this model"):
        asked_of(Model(10, InputError("not of this model")), catalog)
    assert left(catalog) == []


def test_tokens_are_told_of_while_they_are_written(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Event as Flag

    monkeypatch.setattr(chats, "LOOK_S", 0.001)
    seen, said = Flag(), list[Event]()

    class Slow(Model):
        def run(self, request: Mapping[str, object], folder: Path, limits: Limits) -> dict[str, object] | Failure:
            Transcript(folder / TRANSCRIPT_FILE, str(request["key"])).keep([[7] * 20])
            assert seen.wait(30), "nobody told of them"
            return super().run(request, folder, limits)

    class Heard(list[Event]):
        def append(self, event: Event) -> None:
            said.append(event)
            if event.step == "chats":
                seen.set()

    asked_of(Slow(48), catalog, Heard())
    assert [event.text for event in said[1:2]] == ["20 of 48 tokens are written"]


def test_the_time_limit_follows_the_steps_and_the_size_of_the_model(catalog: Catalog, tmp_path: Path) -> None:
    job = quick.job_of(quick.Asked(), tmp_path / "inputs")
    each = weights(chats.read_facts(Path())) / chats.LEAST_WEIGHTS_PER_S
    made = Chats(job, catalog, Model(0).run, [].append)
    for windows, length, steps in ((1, 128, 128), (transcript.TOGETHER, 128, 128), (transcript.TOGETHER + 1, 100, 200)):
        found = made.limits(Asked(((1,),), windows, length))
        assert found.seconds == pytest.approx(job.limits.seconds + steps * each)
        assert found.memory_bytes == job.limits.memory_bytes
