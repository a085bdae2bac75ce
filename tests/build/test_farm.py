"""A build on Ray, without Ray: which device measures, how a lease is held, and what a lost task becomes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmbuild.build.jobs import place_of
from llmbuild.build.ray_farm import RayFarm, lacking
from llmbuild.build.request import BuildRequest
from llmbuild.compiler.afar import Gone
from llmbuild.errors import InputError
from llmbuild.process import rays
from llmbuild.process.rays import ANY, connected, is_ray
from llmbuild.profiler.leased import Leased, Server, needs_of
from llmbuild.profiler.remote import Place, Remote, alone


class RayError(Exception):
    """Ray's own."""


@dataclass
class FakeRay:
    """Ray where a task is its arguments, and `get` returns or raises what a test says."""

    answer: Any
    asked: dict[str, Any] = field(default_factory=dict)
    cancelled: list[Any] = field(default_factory=list)
    exceptions = SimpleNamespace(RayError=RayError)

    def remote(self, function: Any) -> Any:
        made = SimpleNamespace(remote=lambda *words: words)
        return SimpleNamespace(options=lambda **how: (self.asked.update(how), made)[1])

    def get(self, ref: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self, ref: Any, force: bool) -> None:
        self.cancelled.append((ref, force))


def test_a_compile_is_begun_again_elsewhere_but_not_for_ever() -> None:
    ray = FakeRay("made")
    wait, cancel = RayFarm(ray, "ray").submit("sent")  # type: ignore[arg-type]
    assert wait() == "made"
    assert ray.asked == {"max_retries": 3, "num_cpus": 1}
    cancel()
    assert ray.cancelled == [(("sent",), True)]
    wait, _ = RayFarm(FakeRay(RayError("noise\nthe node died")), "ray").submit("sent")  # type: ignore[arg-type]
    with pytest.raises(Gone, match="begun 4 times or cancelled: noise the node died"):
        wait()


def test_a_lease_is_one_device_whatever_it_is_measured_for() -> None:
    assert needs_of("host") == {"llmbuild_device": 1.0}
    assert needs_of("h200") == {"llmbuild_device": 1.0, "llmbuild_target_h200": 0.001}


def test_a_device_that_no_node_has_is_refused_with_what_gives_one() -> None:
    nodes = [
        {"Alive": True, "Resources": {"llmbuild_device": 1.0}},
        {"Alive": False, "Resources": {"llmbuild_device": 1.0, "llmbuild_target_h200": 1.0}},
    ]
    lacking(nodes, needs_of("host"))
    with pytest.raises(InputError, match='"llmbuild_device": 1, "llmbuild_target_h200": 1'):
        lacking(nodes, needs_of("h200"))
    with pytest.raises(InputError, match="--until compile"):
        lacking([], needs_of("host"))


@dataclass(frozen=True)
class Beside(Place):
    """This machine in place of another one."""

    def command(self, script: str) -> list[str]:
        return [sys.executable, *alone(script)]


@pytest.mark.parametrize("leased", [True, False])
def test_a_device_that_others_wait_for_is_held_only_while_it_is_measured(
    leased: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remote = Remote(Beside("here", leased=leased))
    try:
        assert remote.machine == remote.machine
        assert (remote._connection is None) is leased
    finally:
        remote.close()


def test_a_lease_s_process_stands_where_ssh_does() -> None:
    words = Leased("ray", node="n1", target="h200", leased=True).command("print(1)")
    assert words[-5:] == ["llmbuild.profiler.leased", "ray", "n1", "h200", "print(1)"]


def test_the_server_behind_a_lease_says_what_it_says_and_ends_with_its_input() -> None:
    server = Server("import sys\nfor line in sys.stdin: print(line.strip().upper(), flush=True)")
    server.write(b"one\n")
    assert server.read() == b"ONE\n"
    server.write(b"")
    assert server.read() == b""
    server._process.wait(10)
    server._process.stdout.close()  # type: ignore[union-attr]


def test_ray_is_named_by_itself_or_by_an_address() -> None:
    assert [is_ray(text) for text in (ANY, "ray://h:10001", "ssh://ray", "rays", "local")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_without_ray_there_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rays, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Ray is not installed: pip install 'llmbuild\[ray\]'"):
        connected(ANY, "n")
    with pytest.raises(InputError, match="Ray is not installed"):
        place_of(BuildRequest(on="ray://10.0.0.1:10001"))
