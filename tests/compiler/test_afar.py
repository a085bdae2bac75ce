"""Compiles on other machines: the same bytes as here, whatever the folder there; and what is lost is a failure."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild.compiler import afar, calls
from llmbuild.compiler.afar import Afar, Gone, Made, Sent, work
from llmbuild.compiler.calls import Call, here
from llmbuild.process.child import Limits, stop_all
from llmbuild.spec.variant import Failure

TOOL = f"""#!{sys.executable}
import sys
source, *flags, _, output = sys.argv[1:]
text = open(source).read()
if "wrong" in text:
    sys.exit(f"{{source}}:1:1: error: wrong text in {{output}}")
beside = [word.partition("=")[2] for word in flags if word.startswith("--told=")]
if beside and "quiet" not in text:
    open(beside[0], "w").write("told of " + source)
open(output, "w").write(" ".join([text, *flags, "made from", source, "into", output]))
"""


class Inline:
    """Does the work at once, and what a test does to it on the way."""

    def __init__(self, change: Callable[[Made], Made] = lambda made: made) -> None:
        self.change, self.sent, self.cancelled = change, list[Sent](), 0

    def submit(self, sent: Sent) -> tuple[Callable[[], Made], Callable[[], None]]:
        """Work."""
        self.sent.append(sent)
        return lambda: self.change(work(sent, f"n{len(self.sent) % 2}")), self._cancel

    def _cancel(self) -> None:
        self.cancelled += 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for outputs, and a tool in place of the compiler, which writes all paths into them."""
    tool = tmp_path / "tool"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setattr(calls, "binary", lambda name: tool)
    made = tmp_path / "llmbuild-abcdefgh"
    made.mkdir()
    return made


def call(folder: Path, text: str = "text") -> Call:
    source, told = folder / "sources.mlir", folder / "statistics.json"
    source.write_text(text)
    return Call("iree-compile", source, ("--flag", f"--told={told}"), folder / "out.vmfb", told)


LIMITS = Limits(30.0)


def test_what_is_made_elsewhere_is_what_is_made_here(folder: Path) -> None:
    one, farm = call(folder), Inline()
    assert here(one, LIMITS) is None
    expected = {path.name: path.read_bytes() for path in (one.output, folder / "statistics.json")}
    for path in (one.output, folder / "statistics.json"):
        path.unlink()
    runner = Afar(farm)
    assert runner(one, LIMITS) is None
    assert {path.name: path.read_bytes() for path in (one.output, folder / "statistics.json")} == expected
    assert runner.nodes == {"n1": 1}
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, "tool"], "nothing is left"


def test_a_source_in_another_folder_keeps_its_name_and_a_second_file_may_be_left_out(folder: Path) -> None:
    source = folder.parent / "a blob"
    one = replace(call(folder), source=source)
    source.write_text("quiet")
    assert here(one, LIMITS) is None
    expected = one.output.read_bytes()
    assert Afar(Inline())(one, LIMITS) is None
    assert (one.output.read_bytes(), str(source).encode() in expected) == (expected, True)
    assert not (folder / "statistics.json").exists()


def test_a_refusal_is_told_with_the_paths_of_who_asked_and_lasts(folder: Path) -> None:
    one = call(folder, "wrong")
    expected = here(one, LIMITS)
    assert expected is not None
    found = Afar(Inline())(one, LIMITS)
    assert found == expected
    assert not one.output.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: replace(made, files={name: data[:-1] for name, data in made.files.items()}),
        lambda made: replace(made, files={}),
        lambda made: replace(made, digests={}),
    ],
)
def test_what_comes_back_damaged_is_not_written(folder: Path, damage: Callable[[Made], Made]) -> None:
    one = call(folder, "quiet")
    found = Afar(Inline(damage))(one, LIMITS)
    assert found is not None
    assert (found.lasting, "out.vmfb came back damaged" in found.reason) == (False, True)
    assert not one.output.exists()


def test_lost_work_is_a_failure_that_a_later_build_tries_again(folder: Path) -> None:
    def gone(made: Made) -> Made:
        raise Gone("three nodes were lost")

    found = Afar(Inline(gone))(call(folder), LIMITS)
    assert found is not None
    assert (found.stage, found.lasting, found.reason.startswith("three nodes were lost")) == ("compile", False, True)


def test_a_node_with_another_compiler_makes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(call(folder), b"text", 30.0, True, ("1", "2"))
    monkeypatch.setattr(afar, "versions", lambda: ("1", "3"))
    made = work(sent, "n7")
    assert made.failure == Failure(
        "compile",
        "node n7 has llmbuild 1 and iree-base-compiler 3, the build 1 and 2: install the same on all nodes",
        "",
        "",
        lasting=False,
    )


def test_an_interruption_cancels_what_is_under_way(folder: Path) -> None:
    def interrupted(made: Made) -> Made:
        stop_all()
        raise Gone("cancelled")

    farm = Inline(interrupted)
    Afar(farm)(call(folder), LIMITS)
    assert farm.cancelled == 1


def test_the_time_that_is_left_is_sent_and_a_gpu_s_limits_too(folder: Path) -> None:
    farm = Inline()
    Afar(farm)(call(folder), Limits(7.0, memory_bytes=0))
    assert (farm.sent[0].seconds, farm.sent[0].bounded) == (7.0, False)
