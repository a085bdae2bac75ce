"""FairBatching, ISRTF and fair shares: what every batch of theirs holds, and what each is for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.serve.lengths import History
from llmbuild.serve.schedule.fair_batching import FairBatching
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.isrtf import Isrtf, remaining
from llmbuild.serve.schedule.named import Targets, scheduler
from llmbuild.serve.schedule.room import PATIENCE_S
from llmbuild.serve.schedule.state import Entry, Scheduler, Share, State
from llmbuild.serve.schedule.vtc import OUTPUT_WEIGHT, Accounts, Vtc
from llmbuild.serve.simulate import Arrival, Host, simulate
from llmbuild.spec.load_curve import Work
from scripts.bench import schedulers as bench
from tests.support.curves import curve
from tests.support.server import local
from tests.support.serving import ADAPTIVE, Bench

HOST = Host(slots=4, blocks=4 * 32, page=32, context=1024)


def waiting(number: int, pending: int = 8, **more: Any) -> Entry:
    return Entry(number, pending, False, more.pop("arrival_s", 0.0), prompt=pending, **more)


def decoding(number: int, tokens: int, **more: Any) -> Entry:
    return Entry(number, 1, True, more.pop("arrival_s", 0.0), 20 + tokens - 1, tokens, 20, **more)


@st.composite
def states(draw: st.DrawFn) -> State:
    """Draw a state in which something can run."""
    kinds = draw(st.lists(st.one_of(st.just(0), st.integers(1, 40)), max_size=5))
    guess = st.one_of(st.none(), st.floats(1, 100))
    whose, when = st.sampled_from(["", "a", "b"]), st.floats(0, 50)

    def entry(n: int, rest: int) -> Entry:
        tokens = 0 if rest else draw(st.integers(1, 30))
        more = {"tenant": draw(whose), "priority": draw(st.integers(-1, 1)), "predicted": draw(guess)}
        return Entry(n, rest or 1, not rest, draw(when), 0, tokens, 40, takes=draw(st.integers(1, 3)), **more)

    running = tuple(entry(n, rest) for n, rest in enumerate(kinds))
    lengths = draw(st.lists(st.integers(1, 40), min_size=0 if running else 1, max_size=6))
    queue = tuple(entry(len(kinds) + n, rest) for n, rest in enumerate(lengths))
    slots = draw(st.integers(0 if running else 1, 4))
    return State(running, queue, 0, slots, draw(st.integers(0 if running else 3, 8)), {"a": 5.0, "b": 9.0})


@pytest.mark.parametrize("policy", ADAPTIVE)
@given(state=states(), now=st.floats(50, 100))
def test_what_every_batch_holds(policy: Scheduler, state: State, now: float) -> None:
    batch = policy(state, now)
    entries = {one.number: one for one in (*state.running, *state.waiting)}
    numbers = [share.number for share in batch.shares]
    assert batch.shares and len(set(numbers)) == len(numbers)
    assert all(0 < share.tokens <= entries[share.number].pending for share in batch.shares)
    admitted = [one for one in state.waiting if one.number in numbers]
    assert len(admitted) <= state.slots and sum(one.takes for one in admitted) <= state.room
    if policy.cut == 0:  # type: ignore[attr-defined]
        assert all(share.tokens == entries[share.number].pending for share in batch.shares)
    assert policy(state, now) == batch


@pytest.mark.parametrize("policy", ADAPTIVE)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 200), st.integers(1, 30)), min_size=1, max_size=15))
def test_every_request_ends(policy: Scheduler, asked: list[tuple[float, int, int]]) -> None:
    arrivals = [Arrival(at, prompt, output, "ab"[prompt % 2]) for at, prompt, output in sorted(asked)]
    run = simulate(arrivals, policy, HOST, lambda work: 0.01 * work.rows)
    assert [life.tokens for life in run.lives] == [one.output for one in arrivals]


def fair(**more: Any) -> FairBatching:
    return FairBatching(lambda work: 0.01 * work.rows, ttft_s=1.0, tpot_s=0.1, **more)


def test_a_step_takes_no_longer_than_the_most_urgent_answer_allows() -> None:
    ahead = decoding(1, 5, arrival_s=0.0)  # its next token is due at 1.5
    batch = fair()(State((ahead,), (waiting(2, 400, arrival_s=0.9),), 1, 1, 9), 1.0)
    assert batch.shares == (Share(1, 1), Share(2, 49))
    late = fair()(State((ahead,), (waiting(2, 400, arrival_s=0.9),), 1, 1, 9), 1.49)
    assert late.shares == (Share(1, 1), Share(2, 9))  # one pace at least


def test_an_answer_that_is_ahead_waits_for_a_prompt_that_is_not() -> None:
    ahead, due, prompt = decoding(1, 30), decoding(2, 2), waiting(3, 300)
    batch = fair()(State((ahead, due), (prompt,), 1, 1, 9), 0.895)  # due at 4.0, at 1.2, and the prompt at 1.0
    assert batch.shares == (Share(2, 1), Share(3, 29))


def test_prompts_that_are_late_go_behind_those_that_may_be_in_time_until_they_are_old() -> None:
    lost, fresh = waiting(1, 8, arrival_s=0.0), waiting(2, 8, arrival_s=1.9)
    state = State((), (lost, fresh), 2, 1, 9)
    assert [share.number for share in fair()(state, 2.0).shares] == [2]
    old = State((), (lost, waiting(2, 8, arrival_s=4.9)), 2, 1, 9)
    assert [share.number for share in fair()(old, 5.0).shares] == [1]


def test_requests_have_their_own_deadlines() -> None:
    hurried, calm = waiting(1, 8, ttft_s=5.0), waiting(2, 8, ttft_s=0.2)
    assert [share.number for share in fair()(State((), (hurried, calm), 2, 1, 9), 0.0).shares] == [2]


def test_the_shortest_answer_is_admitted_first_and_waiting_makes_shorter() -> None:
    long, short = waiting(1, predicted=200.0), waiting(2, predicted=10.0, arrival_s=5.0)
    state = State((), (long, short), 2, 1, 9)
    assert [share.number for share in Isrtf(ageing=0.0)(state, 10.0).shares] == [2]
    assert [share.number for share in Isrtf(ageing=50.0)(state, 10.0).shares] == [1]


def test_the_fewest_tokens_left_run_where_rows_are_few() -> None:
    state = State((decoding(1, 5, predicted=100.0), decoding(2, 95, predicted=100.0)), (), 0)
    assert Isrtf(rows=1)(state, 0.0).shares == (Share(2, 1),)


def test_an_answer_that_overruns_its_prediction_is_expected_to_go_on() -> None:
    assert remaining(decoding(1, 10, predicted=60.0)) == 50.0
    assert remaining(decoding(1, 400, predicted=60.0)) == 100.0


def test_shortest_first_ends_sooner_in_the_mean_with_an_oracle() -> None:
    drawn = [Arrival(0.0, 8, 4 if i % 2 else 120, predicted=4.0 if i % 2 else 120.0) for i in range(40)]
    ends = [
        sum(life.end_s for life in simulate(drawn, policy, HOST, lambda work: 0.01 + 0.001 * work.rows).lives)
        for policy in (Fcfs(), Isrtf())
    ]
    assert ends[1] < 0.8 * ends[0]


def test_who_was_served_least_is_admitted_next() -> None:
    queue = (waiting(1, tenant="a"), waiting(2, tenant="a"), waiting(3, tenant="b"))
    state = State((), queue, 3, 2, 9, {"a": 0.0, "b": 4.0})
    assert [share.number for share in Vtc()(state, 0.0).shares] == [1, 3]


def test_a_tenant_that_comes_back_has_not_saved_up() -> None:
    accounts = Accounts()
    accounts.arrived("a")
    accounts.prompt("a", 100)
    accounts.token("a")
    accounts.arrived("b")
    assert dict(accounts.served) == {"a": 100 + OUTPUT_WEIGHT, "b": 100 + OUTPUT_WEIGHT}
    accounts.ended("a")
    accounts.prompt("b", 7)
    accounts.arrived("a")
    assert accounts.served["a"] == accounts.served["b"] == 107 + OUTPUT_WEIGHT


def test_backlogged_tenants_get_equal_shares_whoever_asks_more() -> None:
    arrivals = [Arrival(0.0, 20, 10, "greedy") for _ in range(60)] + [
        Arrival(0.01, 20, 10, "modest") for _ in range(10)
    ]
    runs = {type(p): simulate(arrivals, p, HOST, lambda work: 0.01 * work.rows) for p in (Fcfs(), Vtc())}
    ends = {kind: max(one.end_s for one in run.lives[60:]) / run.end_s for kind, run in runs.items()}
    assert ends[Fcfs] == 1.0
    assert ends[Vtc] < 0.45  # 20 of 70 requests, and what ran when it came


def test_nobody_overtakes_for_ever_a_request_that_needs_much_memory() -> None:
    large, small = waiting(1, takes=9, arrival_s=0.0), waiting(2, takes=1, arrival_s=1.0)
    state = State((decoding(3, 2),), (large, small), 0, 2, 5)
    for policy in (fair(), Isrtf()):
        early, late = policy(state, 2.0), policy(state, PATIENCE_S + 1.0)
        assert 2 in {share.number for share in early.shares}
        assert 2 not in {share.number for share in late.shares}


def test_priority_goes_before_arrival_with_every_scheduler() -> None:
    for policy in (Fcfs(8), *ADAPTIVE):
        box = Bench(slots=1, scheduler=policy)
        box.submit("first", [1, 2], max_tokens=4, ignore_eos=True)
        box.engine.turn()
        box.submit("late", [3, 4], max_tokens=2, ignore_eos=True)
        box.submit("urgent", [5, 6], max_tokens=2, ignore_eos=True, priority=-1)
        box.settle()
        order = [event.request for event in box.events if getattr(event, "finish", None)]
        assert order == ["first", "urgent", "late"], policy


def test_lengths_are_learnt_of_each_tenant_and_grow_with_the_answer() -> None:
    history, box = History(), Bench()
    made = {name: box.submit(name, [1], max_tokens=200, tenant=name) for name in ("a", "b")}
    assert history.predict(made["a"], 0) is None
    for tokens in (10, 20, 30, 40) * 3:
        history.learn(made["a"], tokens)
    assert [history.predict(made["a"], tokens) for tokens in (0, 20, 35, 100)] == [25.0, 35.0, 40.0, 150.0]
    assert history.predict(made["b"], 0) is None


def test_the_engine_tells_schedulers_what_it_expects_and_learns() -> None:
    seen: list[Entry] = []

    def watching(state: State, now_s: float) -> Any:
        seen.extend((*state.running, *state.waiting))
        return Fcfs()(state, now_s)

    box = Bench(slots=4, scheduler=watching)
    for i in range(9):
        box.submit(f"r{i}", [1, 2, 3], max_tokens=7, ignore_eos=True, tenant="t", ttft_s=0.5)
        box.settle()
    box.submit("last", [1, 2, 3], max_tokens=20, ignore_eos=True, tenant="t")
    box.engine.turn()
    assert (seen[0].predicted, seen[-1].predicted, seen[0].ttft_s, seen[-1].ttft_s) == (7.0, 7.0, 0.5, None)
    assert (seen[-1].prompt, seen[-1].tenant, seen[-1].takes) == (3, "t", 6)


def test_deadlines_need_a_curve_and_targets() -> None:
    with pytest.raises(InputError, match=r"needs the load curve of the variant of m.*profile VARIANT --load"):
        scheduler("fairbatching", 1, "m")
    with pytest.raises(InputError, match="needs deadlines: give --slo"):
        scheduler("fairbatching", 1, "m", curve())
    made = scheduler("fairbatching", 1, "m", curve(), Targets(1.0, 0.1))
    assert isinstance(made, FairBatching) and made.step_s(Work.of([(9, 1)])) == curve().step_s(Work.of([(9, 1)]))


def test_requests_carry_a_class_and_a_priority() -> None:
    with local() as found, found.client() as client:
        body = {"model": "fake", "prompt": "abc", "max_tokens": 2, "priority": 3, "slo_class": "chat"}
        assert client.post("/v1/completions", json=body).status_code == 200
        refused = client.post("/v1/completions", json={**body, "slo_class": "gold"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "slo_class"
        assert refused.json()["error"]["message"] == "slo_class is 'gold'; this server has chat"
        wrong = client.post("/v1/completions", json={**body, "priority": 1000})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "priority"


def test_the_comparison_of_schedulers_runs_the_same_requests_under_each(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main("--loads 90 --seeds 2 --requests 40 --json".split())
    told = json.loads(capsys.readouterr().out)
    by_name = {row["scheduler"]: row for row in told["rows"]}
    assert list(by_name) == [
        *("fcfs", "sarathi", "fairbatching", "isrtf oracle", "isrtf noisy", "isrtf history", "isrtf blind", "vtc")
    ]
    assert len({row["rate_per_s"] for row in told["rows"]}) == 1
    assert by_name["isrtf blind"]["e2e_s_mean"] == by_name["sarathi"]["e2e_s_mean"]  # nothing to prefer


def test_schedulers_are_compared_by_what_a_predictor_said_of_unseen_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A predictor that is right orders as an oracle does; one that is mistaken does not."""
    outputs = [10 if i % 2 else 200 for i in range(8)]
    rows = [
        {
            "prompt": 20,
            "output": n,
            "cut": False,
            "tenant": str(n),
            "z": math.log1p(n),
            "z_other_groups": math.log1p(210 - n),
        }
        for n in outputs
    ]
    (tmp_path / "held").write_text(json.dumps({"max_tokens": 200, "quantiles": [-0.1, 0.0, 0.1], "rows": rows}))
    bench.main(["--answers", str(tmp_path / "held"), *"--loads 110 --seeds 2 --requests 80 --json".split()])
    by_name = {row["scheduler"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {"isrtf trained", "isrtf other groups", "isrtf kinds"} < set(by_name)
    ratio = {name: row["e2e_s_of_fcfs"] for name, row in by_name.items()}
    assert ratio["fcfs"] == 1.0 and ratio["isrtf oracle"] < 0.95
    assert ratio["isrtf trained"] == pytest.approx(ratio["isrtf oracle"], rel=0.05)
    assert ratio["isrtf other groups"] > ratio["isrtf trained"]
