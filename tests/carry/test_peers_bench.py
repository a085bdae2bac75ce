from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmbuild.errors import InputError
from llmbuild.process.child import Limits
from llmbuild.profiler import noise

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(SCRIPTS))

import peer_worker  # noqa: E402
import peers  # noqa: E402
from comparison import gguf_file, setup, table  # noqa: E402
from comparison.rounds import Entrant, Participant, Plan, Worker, WorkerFailed, compare  # noqa: E402

FAKE = """
import json, os, sys, time
kind, scale, count = sys.argv[1], float(sys.argv[2]), 0
for line in sys.stdin:
    request = json.loads(line)
    if request["verb"] == "open":
        print(json.dumps({"load_s": scale, "first_token_s": 2 * scale, "version": "1.0"}), flush=True)
        continue
    count += 1
    if kind == "crashes" and count == 2:
        os.kill(os.getpid(), 11)
    if kind == "hangs":
        time.sleep(60)
    if kind == "stops within a line":
        sys.stdout.write("{"); sys.stdout.flush(); time.sleep(60)
    if kind == "refuses":
        print(json.dumps({"refused": "ValueError: too small"}), flush=True)
        continue
    decode = [scale * (1 + count)] * len(request["forced"])
    print(json.dumps({"prefill_s": scale, "decode_s": decode, "peak_memory_bytes": 7}), flush=True)
"""


def fake(name: str, runtime: str, kind: str, scale: float, behaviour: str = "works") -> Participant:
    return Participant(name, runtime, kind, (sys.executable, "-c", FAKE, behaviour, str(scale)), {})


def plan(rounds: int = 3, seconds: float = 20.0) -> Plan:
    return Plan((1, 2), (3, 4), (), rounds, 1, Limits(seconds=seconds))


def ran(*participants: Participant, rounds: int = 3, seconds: float = 20.0) -> dict[str, Entrant]:
    found, _ = compare(participants, plan(rounds, seconds), lambda _: None)
    return {entrant.participant.name: entrant for entrant in found}


@pytest.mark.parametrize(
    ("weight_format", "metric", "expected"),
    [
        ("int8", "decode_s", ("llama.cpp", "q8_0")),
        ("int4", "first_token_s", ("llama.cpp", "q4_0")),
        ("int4_g128", "decode_s", ("llama.cpp", "q4_0")),
        ("int4a_g64", "decode_s", ("llama.cpp", "q4_0")),
        ("bf16", "decode_s", ("llama.cpp", "f16")),
        ("f12_e4m7", "decode_s", ("llama.cpp", "f16")),
        ("int7_g64", "decode_s", ("llama.cpp", "q8_0")),
        ("f16", "decode_s", ("llama.cpp", "f16")),
        ("int4", "prefill_s", ("openvino", "int8")),
        ("ternary", "decode_s", None),
    ],
)
def test_each_format_meets_its_peer(weight_format: str, metric: str, expected: tuple[str, str] | None) -> None:
    assert table.peer_of(weight_format, metric) == expected


def test_ratios_are_ours_over_theirs_paired_by_round() -> None:
    found = ran(fake("llmbuild int8", "llmbuild", "int8", 1.0), fake("llama.cpp q8_0", "llama.cpp", "q8_0", 4.0))
    read = table.ratios(found["llmbuild int8"], list(found.values()))
    assert set(read) == {"decode_s", "first_token_s"}
    assert read["decode_s"] == {"to": "llama.cpp q8_0", "median": 0.25, "low": 0.25, "high": 0.25, "rounds": 3}


def test_only_rounds_that_both_ran_are_paired() -> None:
    mine, theirs = Entrant(fake("a", "llmbuild", "int8", 1)), Entrant(fake("b", "llama.cpp", "q8_0", 1))
    mine.samples, theirs.samples = {"decode_s": {1: 1.0, 2: 8.0, 3: 3.0}}, {"decode_s": {2: 4.0}}
    read = table.ratio(mine, theirs, "decode_s")
    assert read is not None and read.samples == pytest.approx((2.0,))
    assert table.ratio(mine, theirs, "prefill_s") is None


def test_a_worker_that_crashes_is_a_row_and_the_others_go_on() -> None:
    found = ran(fake("good", "llmbuild", "int8", 1.0), fake("bad", "llama.cpp", "q8_0", 1.0, "crashes"))
    rows = {row["participant"]: row for row in table.rows(list(found.values()))}
    assert rows["bad"]["status"] == "failed" and "SIGSEGV" in rows["bad"]["reason"]
    assert rows["good"]["status"] == "measured" and len(rows["good"]["samples"]["prefill_s"]) == 3
    assert json.loads(json.dumps(rows)) == rows


def test_one_at_a_time_counts_the_second_round_of_each_start() -> None:
    alone = Plan((1, 2), (3, 4), (), 2, 1, Limits(seconds=20.0), alone=True)
    (found,), _ = compare([fake("a", "llmbuild", "int8", 1.0)], alone, lambda _: None)
    assert found.samples["load_s"] == {1: 1.0, 2: 1.0} and found.samples["decode_s"] == {1: 3.0, 2: 3.0}
    assert found.worker is None and not found.reason


@pytest.mark.parametrize("behaviour", ["hangs", "stops within a line"])
def test_a_worker_that_does_not_answer_is_ended(behaviour: str) -> None:
    found = ran(fake("slow", "torch", "float32", 1.0, behaviour), rounds=1, seconds=1.0)
    assert found["slow"].reason == "no answer within 1 s"


def test_a_worker_that_refuses_tells_why() -> None:
    assert ran(fake("shy", "torch", "float32", 1.0, "refuses"))["shy"].reason == "ValueError: too small"


def test_a_worker_that_cannot_start_tells_its_last_line() -> None:
    worker = Worker([sys.executable, "-c", "raise SystemExit('no such library')"], Limits(seconds=20))
    with pytest.raises(WorkerFailed, match="ended with 1 instead of an answer: no such library"):
        worker.ask("open")
    worker.close()


def test_the_table_has_a_line_for_what_is_absent() -> None:
    absent = Participant("openvino int8", "openvino", "int8", (), {}, absent="does not install: no wheel")
    found = ran(fake("llmbuild int8", "llmbuild", "int8", 1e-3), absent)
    lines = table.text(table.rows(list(found.values())), 128).splitlines()
    assert any(line.startswith("openvino int8") and line.split()[2:] == ["-"] * 5 for line in lines)
    assert lines[-1] == "openvino int8: absent: does not install: no wheel"


def test_cpu_time_that_is_not_ours_is_told_as_noise() -> None:
    before, after = noise.Snapshot(0, 1000, 100), noise.Snapshot(0, 2000, 700)
    assert "other processes took 40% of the CPUs" in noise.verdict(before, after, 1000, own_ticks=200)
    assert noise.verdict(before, after, 1000, own_ticks=580) == noise.verdict(before, after, 1000) == ""
    assert noise.cpu_ticks([os.getpid(), 1 << 30]) >= noise.cpu_ticks([1 << 30]) == 0


def test_peers_are_asked_for_by_name_and_format() -> None:
    assert setup.asked_peers(["openvino:int8", "torch"]) == {"openvino": ("int8",), "torch": ("float32",)}
    with pytest.raises(InputError, match="no peer 'onnx'"):
        setup.asked_peers(["onnx"])
    with pytest.raises(InputError, match="no format 'q9'"):
        setup.asked_peers(["llama.cpp:q9"])


def test_every_package_is_pinned() -> None:
    text = setup.REQUIREMENTS.read_text()
    for names in (setup.WRITERS, *setup.PACKAGES.values()):
        assert all("==" in line for line in setup.pins(names, text).values())


def test_an_environment_that_lacks_a_peer_says_which_and_nothing_is_installed(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    place = setup.environment(tmp_path, False, ["openvino"], lambda _: None)
    assert "not installed in" in place.reasons["openvino"]
    with pytest.raises(InputError, match="no environment here"):
        setup.environment(tmp_path / "none", False, ["openvino"], lambda _: None)


def test_the_best_of_each_format_takes_part_by_decode_and_by_prompt() -> None:
    def row(name: str, kind: str, tpot: float, ttft: float) -> dict[str, Any]:
        return {"variant": name, "point": {"weight_format": kind}, "tpot_s": tpot, "ttft_s": ttft}

    rows = [row("a", "int8", 1, 9), row("b", "int8", 2, 3), row("c", "f16", 5, 6), row("d", "f16", 7, 8)]
    names = [(name, found["variant"]) for name, found in setup.best(rows)]
    assert names == [("llmbuild f16", "c"), ("llmbuild int8 tpot", "a"), ("llmbuild int8 ttft", "b")]


def test_a_round_fills_the_context_between_prompt_and_single_tokens() -> None:
    asked = peers.options(["--prompt", "4", "--decode", "3", "--context", "9"])
    made = peers.plan(asked, 50)
    assert (len(made.prompt), len(made.fill), len(made.forced), peers.positions(asked)) == (4, 5, 3, 12)
    calls: list[tuple[int, int]] = []
    runner = peer_worker.Runner(lambda _: (lambda: lambda tokens, past: calls.append((len(tokens), past)), "1"))
    runner.open({"first": [1, 2]})
    told = runner.round({"prompt": made.prompt, "forced": made.forced, "fill": made.fill})
    assert calls == [(2, 0), (4, 0), (4, 0), (5, 4), (1, 9), (1, 10), (1, 11)]
    assert len(told["decode_s"]) == 3 and told["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.11.self_attn.o_proj.weight", "blk.11.attn_output.weight"),
        ("model.layers.3.self_attn.k_proj.bias", "blk.3.attn_k.bias"),
        ("model.layers.3.self_attn.q_norm.weight", "blk.3.attn_q_norm.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ],
)
def test_weights_have_the_names_of_gguf(name: str, expected: str) -> None:
    assert gguf_file.tensor_name(name) == expected


def test_the_peer_worker_needs_nothing_of_ours() -> None:
    code = "import sys, peer_worker; print([m for m in sys.modules if m.split('.')[0] in ('llmbuild', 'numpy')])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_a_comparison_without_peers_is_one_json_document(built: Any) -> None:
    command = [sys.executable, str(SCRIPTS / "peers.py"), "--recipe", str(built.recipe), "-C", str(built.catalog)]
    more = ["--peers", "--prompt", "8", "--decode", "4", "--rounds", "2", "--loads", "1", "--json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert {row["runtime"] for row in made["rows"]} == {"llmbuild", "streaming"} and made["machine"]
    assert all(row["decode_s"] > 0 and row["load_s"] > 0 for row in made["rows"])
