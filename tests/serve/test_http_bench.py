"""The comparison of servers over HTTP: its requests, its client against a real server, its pairs and its table."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from llmbuild.errors import InputError
from llmbuild.process.child import Limits
from tests.support.server import local
from tests.support.serving import CONTEXT

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(SCRIPTS))

import http_client  # noqa: E402
import serve_http  # noqa: E402
from comparison import asks, http_servers, llama_server, serve_table  # noqa: E402
from comparison.asks import Ask, Cutter  # noqa: E402
from comparison.http_servers import Answer, Entrant, Run, Server  # noqa: E402
from comparison.rounds import Worker, WorkerFailed  # noqa: E402

TOKENS = tuple(range(1000))
PEER, OURS = serve_http.PEER, "llmbuild q4_1"


def cutter(seed: int = 0) -> Cutter:
    return Cutter(TOKENS, random.Random(seed))


def answer(ttft_s: float = 0.1, e2e_s: float = 1.1, tokens: int = 11, text: str = "a", **more: Any) -> Answer:
    given = {"prompt_tokens": 2, "cached_tokens": 0, **more}
    return Answer(Ask((1, 2), tokens), ttft_s, e2e_s, output_tokens=tokens, text=text, **given)


def run(*answers: Answer, wall_s: float = 2.0) -> Run:
    return Run(answers, wall_s, client_cpu_s=0.2, server_cpu_s=3.3)


def event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


# --- requests --------------------------------------------------------------------------------------------------------


def test_requests_fit_in_the_context_begin_apart_and_are_those_of_the_seed() -> None:
    drawn = cutter().asks(asks.drawn, 300, 96)
    assert {len(one.prompt) + one.output <= 96 for one in drawn} == {True}
    assert min(one.output for one in drawn) >= asks.LEAST_OUTPUT
    assert len({one.prompt[0] for one in drawn}) == 300
    assert drawn == cutter().asks(asks.drawn, 300, 96) != cutter(1).asks(asks.drawn, 300, 96)


def test_a_prompt_goes_on_at_the_beginning_of_the_text() -> None:
    cut = Cutter((5, 6, 7), random.Random(0))
    assert {cut.cut(3) for _ in range(3)} == {(5, 6, 7), (6, 7, 5), (7, 5, 6)}
    with pytest.raises(InputError, match="the text has 3 tokens: too few"):
        cut.cut(1)


def test_lengths_of_a_trace_are_divided(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:47,80,4\n"
    )
    lengths, draw = asks.of_trace(file, asks.scale_of("8:4")), random.Random(0)
    assert {lengths(draw) for _ in range(50)} == {(47, 11), (10, 1)}
    assert [(len(one.prompt), one.output) for one in cutter().asks(lambda _: (0, 1), 1, 32)] == [(1, 2)]


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "ContextTokens,GeneratedTokens\n", "ContextTokens,GeneratedTokens\nx,1\n"]
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=r"--trace .*trace\.csv"):
        asks.of_trace(file, (1, 1))
    with pytest.raises(InputError, match=r"--trace .*none\.csv"):
        asks.of_trace(tmp_path / "none.csv", (1, 1))


@pytest.mark.parametrize("text", ["8", "8:0", "a:b", "1:2:3", "inf:1"])
def test_what_is_no_scale_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="cannot read --scale"):
        asks.scale_of(text)


# --- the client ------------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_first_and_the_last_token_wherever_a_stream_is_cut() -> None:
    usage = (
        '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":0}}}'
    )
    whole = event('{"choices":[{"text":""}]}') + event('{"choices":[{"text":"å"}],"usage":null}')
    whole += b": still working\n\n" + event('{"choices":[{"text":"b"}]}')
    ends = event(usage) + event("[DONE]")
    told = {"ttft_s": 2.0, "e2e_s": 2.0, "prompt_tokens": 3, "output_tokens": 3, "cached_tokens": 0, "text": "åb"}
    for at in range(len(whole)):
        found = http_client.answer(1.0, [(2.0, whole[:at]), (3.0, whole[at:]), (9.0, ends)])
        assert {**found, "ttft_s": 0, "e2e_s": 0} == {**told, "ttft_s": 0, "e2e_s": 0}
        assert found["ttft_s"] in (1.0, 2.0)
        assert found["e2e_s"] == 2.0


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (event('{"error": {"message": "no memory"}}'), "a stream tells of an error: .*no memory"),
        (event('{"choices":[{"text":"a"}]}') + event("[DONE]"), "no usage"),
        (event('{"choices":[{"text":"a"}],"usage":{"prompt_tokens":1,"completion_tokens":1}}'), "no end"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(told: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        http_client.answer(0.0, [(1.0, told)])


def test_the_client_gets_from_a_real_server_what_is_asked_for_and_tells_what_is_not() -> None:
    entrant = Entrant("fake", (), "fake")
    drawn = Cutter(tuple(range(6, 60)), random.Random(0)).asks(lambda draw: (3, draw.randint(2, 9)), 8, CONTEXT)
    worker = Worker([sys.executable, str(SCRIPTS / "http_client.py")], Limits(seconds=60, memory_bytes=0))
    try:
        with local(slots=2) as server:
            found = http_servers.run(worker, Server(entrant, server.url, worker.process_id), drawn, 4)
            assert http_servers.unlike("fake", found.answers) == []
            assert [one.output_tokens for one in found.answers] == [one.output for one in drawn]
            assert all(0 < one.ttft_s <= one.e2e_s <= found.wall_s for one in found.answers)
            assert found.client_cpu_s > 0
            asked = Server(Entrant("fake", (), "other"), server.url, worker.process_id)
            with pytest.raises(WorkerFailed, match="404"):
                http_servers.run(worker, asked, drawn, 1)
            again = http_servers.run(worker, Server(entrant, server.url, worker.process_id), drawn, 1)
            assert [one.text for one in again.answers] == [one.text for one in found.answers]
    finally:
        worker.close()


def test_answers_that_are_not_what_was_asked_for_are_told() -> None:
    assert http_servers.unlike("it", [answer()]) == []
    assert http_servers.unlike("it", [answer(prompt_tokens=3)]) == ["it counts 3 tokens of a prompt of 2"]
    short = Answer(Ask((1, 2), 5), 0.1, 0.2, 2, 4, None, "")
    assert http_servers.unlike("it", [short]) == ["it answers with 4 tokens where 5 are asked for"]
    taken = ["it took 1 tokens of a prompt from its cache"]
    assert http_servers.unlike("it", [answer(cached_tokens=1)]) == taken
    assert http_servers.unlike("it", [answer(cached_tokens=1)], cached=True) == []
    assert http_servers.unlike("it", [answer(cached_tokens=None)], cached=True) == [taken[0].replace("1", "None", 1)]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_of_all_requests_together() -> None:
    many = [answer(ttft_s=0.01 * n, e2e_s=0.01 * n + 1.0) for n in range(1, 101)]
    found = serve_table.figures([run(*many[:50], wall_s=10.0), run(*many[50:], wall_s=12.0)])
    assert found["output_tokens_per_s"] == pytest.approx(1100 / 22)
    assert (found["ttft_s_p50"], found["ttft_s_p99"]) == (0.5, 0.99)
    assert found["tpot_s_p50"] == pytest.approx(0.1)
    assert found["client_cpu_share"] == pytest.approx(0.4 / 22)
    assert found["server_cpu_s_per_token"] == pytest.approx(6.6 / 1100)


def test_only_rounds_that_both_ran_are_paired() -> None:
    mine = {1: run(answer(), wall_s=1.0), 2: run(answer(), wall_s=1.0), 4: run(answer(), wall_s=99.0)}
    theirs = {1: run(answer(ttft_s=0.2), wall_s=2.0), 2: run(answer(ttft_s=0.2), wall_s=2.0), 3: run(answer())}
    found = serve_table.ratios(mine, theirs)
    assert found["output_tokens_per_s"] == pytest.approx({"median": 2.0, "low": 2.0, "high": 2.0, "rounds": 2})
    assert found["ttft_s_p50"]["median"] == pytest.approx(0.5)
    assert serve_table.ratios({4: run(answer())}, theirs) == {}


def test_the_table_has_each_figure_beside_the_peer_s_and_what_was_checked() -> None:
    ours = {1: run(answer(), answer(text="b"), wall_s=1.0)}
    peer = {1: run(answer(), answer(), wall_s=2.0)}
    made = {
        "machine": "a machine",
        "cores": "servers on 2 cores",
        "file": "a.gguf",
        "peer": PEER,
        "context": 1024,
        "sequences": 8,
        "rounds": 1,
        "requests": 2,
        "lengths": "drawn",
        "choices": {OURS: "kernel=own"},
        "noise": "",
        "rows": serve_table.rows({8: {PEER: peer, OURS: ours}}, PEER),
        "wrong": ["it counts 3 tokens of a prompt of 2"],
    }
    told = serve_http.text(made)
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert f"{OURS} 8 output tokens/s 22.0/s 11.0/s 2.00 [2.00, 2.00]" in lines
    assert f"{OURS} 8 ttft p99 100 ms 100 ms 1.00 [1.00, 1.00]" in lines
    assert f"{OURS} 8 client cpu share 20.0% 10.0%" in lines
    assert f"{OURS}, 8 streams: 2 requests, 50% answered with the same text" in lines
    assert "wrong: it counts 3 tokens of a prompt of 2" in lines


# --- the peer --------------------------------------------------------------------------------------------------------

CMAKE = """\
-- Configuring done
CMake Warning:
  Manually-specified variables were not used by the project:

    LLAMA_BUILD_UI
    SOMEBODY_ELSES


-- Build files have been written to: /tmp/x
"""


def test_an_option_that_llama_cpp_does_not_know_is_found_in_what_cmake_says() -> None:
    assert llama_server.unused(CMAKE) == ["LLAMA_BUILD_UI"]
    assert llama_server.unused("-- Configuring done\n-- LLAMA_BUILD_UI\n") == []


def test_the_shapes_of_amx_tiles_are_kept_once(tmp_path: Path) -> None:
    file = tmp_path / llama_server.TILES
    with pytest.raises(InputError, match=r"this llama\.cpp is another"):
        llama_server.mend(tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text("    tc.rows[7] = 16;\n\n    _tile_loadconfig(&tc);\n    done = true;\n")
    for _ in range(2):
        llama_server.mend(tmp_path)
        lines = [line.strip() for line in file.read_text().splitlines()]
        assert lines[2:] == ['asm volatile("" : : "r"(&tc) : "memory");', "_tile_loadconfig(&tc);", "done = true;"]


def test_a_server_that_is_not_there_is_built_only_in_a_folder_of_our_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no llama-server here"):
        llama_server.server(tmp_path, Path(sys.executable), False, print)
    made = tmp_path / "llama-server" / "bin" / "llama-server"
    made.parent.mkdir(parents=True)
    made.touch()
    assert llama_server.server(tmp_path, Path(sys.executable), False, print) == made
    command = llama_server.command(made, Path("a.gguf"), 16, 1024, 2)
    assert command[command.index("--ctx-size") + 1] == "16384"


def test_a_server_that_ends_is_told_with_its_last_line() -> None:
    script = "import sys; print('no such model', file=sys.stderr); sys.exit(3)"
    entrant = Entrant("peer", (sys.executable, "-c", script), "m")
    with (
        pytest.raises(InputError, match=r"peer does not answer: .*no such model"),
        http_servers.started([entrant], [0]),
    ):
        pass


@pytest.mark.parametrize(
    "words",
    [
        ["--rounds", "0"],
        ["--streams", "0"],
        ["--alone", "--prefix", "8"],
        ["--openvino", "x", "--alone"],
        ["--threads", "100000"],
    ],
)
def test_counts_that_cannot_be_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        serve_http.options(words)
