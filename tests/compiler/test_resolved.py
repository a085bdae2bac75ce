from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild.compiler import iree, resolved
from llmbuild.compiler.resolved import Answers
from llmbuild.runtime import host
from llmbuild.spec.target import Target

TARGET = Target("host", "llvm-cpu", "x86_64", "host")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    """What the compiler was asked for."""
    calls: list[Target] = []

    def answer(target: Target) -> Target:
        calls.append(target)
        return replace(target, cpu="znver4", features=("+avx2", "-sse4a"), requires=("avx2",))

    monkeypatch.setattr(iree, "resolve", answer)
    return calls


def test_a_known_target_is_not_asked_for_again_and_has_the_same_answer(asked: list[Target], tmp_path: Path) -> None:
    first, second = resolved.resolve(TARGET, Answers(tmp_path / "a")), resolved.resolve(TARGET, Answers(tmp_path / "a"))
    assert (second, second.cpu, len(asked)) == (first, "znver4", 1)


def test_another_cpu_compiler_or_target_is_asked_for(
    asked: list[Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved.resolve(TARGET, Answers(tmp_path / "a"))
    resolved.resolve(replace(TARGET, features=("+avx512f",)), Answers(tmp_path / "a"))
    monkeypatch.setattr(host, "features", lambda: frozenset({"sse2"}))
    resolved.resolve(TARGET, Answers(tmp_path / "a"))
    monkeypatch.setattr(iree, "compiler_version", lambda: "9.9.9")
    resolved.resolve(TARGET, Answers(tmp_path / "a"))
    assert len(asked) == 4


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"cpu": "x", "features": 3, "requires": []}'])
def test_a_damaged_answer_is_asked_for_again(asked: list[Target], tmp_path: Path, text: str) -> None:
    expected = resolved.resolve(TARGET, Answers(tmp_path / "a"))
    (path,) = (tmp_path / "a").iterdir()
    path.write_text(text)
    assert (resolved.resolve(TARGET, Answers(tmp_path / "a")), len(asked)) == (expected, 2)


def test_answers_that_cannot_be_written_or_are_not_to_be_are_done_without(asked: list[Target], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert resolved.resolve(TARGET, Answers(tmp_path / "file" / "a")).cpu == "znver4"
    assert resolved.resolve(TARGET, Answers(tmp_path / "dry", keep=False)).cpu == "znver4"
    assert not (tmp_path / "dry").exists()
    assert len(asked) == 2
