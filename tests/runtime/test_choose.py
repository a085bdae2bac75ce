from __future__ import annotations

from typing import Any

import pytest

from llmbuild.errors import InputError
from llmbuild.runtime.choose import HostFacts, choose, refusal
from llmbuild.runtime.host import llvm_features
from llmbuild.spec.machine import NOWHERE
from llmbuild.spec.slo import parse_bound, parse_slo

HOST = HostFacts("x86_64", frozenset({"avx2", "fma"}), "3.13.0", 1 << 30, "here")


def row(variant: str = "v", **changes: Any) -> dict[str, Any]:
    base = {
        "variant": variant,
        "artifact": "a",
        "runtime": "3.13.0",
        "target_body": {"arch": "x86_64", "requires": ["avx2"]},
        "machine": "a machine",
        "machine_digest": "here",
        "status": "pareto",
        "reason": "",
        "tpot_s": 0.01,
        "output_tokens_per_s": 100.0,
        "peak_memory_bytes": 1 << 20,
        "artifact_bytes": 1000,
        "quality_kl": 0.0,
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"runtime": "3.12.0"}, "needs IREE runtime 3.12, installed is 3.13.0"),
        ({"target_body": {"arch": "aarch64", "requires": []}}, "is for aarch64, this host is x86_64"),
        ({"target_body": {"arch": "x86_64", "requires": ["avx2", "avx512f"]}}, "lacks: avx512f"),
        ({"peak_memory_bytes": 1 << 31}, "needs 2147 MB of memory"),
        ({"artifact": None, "reason": "compile: crashed"}, "compile: crashed"),
    ],
)
def test_what_must_not_be_opened_is_refused_with_the_reason(changes: dict, told: str) -> None:
    assert told in refusal(row(**changes), HOST)


def test_the_best_that_meets_the_slo_is_chosen_and_every_other_row_has_a_reason() -> None:
    rows = [row("fast", tpot_s=0.01, quality_kl=0.5), row("good", tpot_s=0.02), row("slow", tpot_s=0.03)]
    pick = choose(rows, HOST, parse_slo(["quality_kl<=0.1"], "tpot_s"))
    assert pick.chosen is rows[1]
    assert {c.row["variant"]: c.reason for c in pick.candidates} == {
        "fast": "quality_kl is 0.5, quality_kl<=0.1 asked",
        "good": "",
        "slow": "meets the SLO, but tpot_s is 0.03 against 0.02",
    }


def test_without_a_word_on_quality_what_is_as_good_as_the_model_goes_first() -> None:
    rows = [
        row("worse", tpot_s=0.01, quality_kl=0.0101, quality_top1=0.99),
        row("other answers", tpot_s=0.02, quality_kl=0.01, quality_top1=0.93),
        row("never scored", tpot_s=0.03, quality_kl=None, quality_top1=None),
        row("good", tpot_s=0.04, quality_kl=0.01, quality_top1=0.94),
        row("exact", tpot_s=0.05, quality_kl=0.0, quality_top1=1.0),
    ]
    pick = choose(rows, HOST, parse_slo([], None))
    assert pick.chosen is rows[3]
    assert [r["variant"] for r in pick.fallbacks] == ["exact"]
    told = "others are as good as the model: {} asked; an SLO that bounds quality decides instead"
    assert {c.row["variant"]: c.reason for c in pick.candidates} == {
        "worse": told.format("quality_kl is 0.0101, quality_kl<=0.01"),
        "other answers": told.format("quality_top1 is 0.93, quality_top1>=0.94"),
        "never scored": told.format(
            "quality_kl is absent, quality_kl<=0.01 asked; quality_top1 is absent, quality_top1>=0.94"
        ),
        "good": "",
        "exact": "meets the SLO, but tpot_s is 0.05 against 0.04",
    }
    assert pick.explain().splitlines()[0] == (
        "asked: no bounds; best tpot_s; of those as good as the model (quality_kl<=0.01, quality_top1>=0.94) "
        "if there are any"
    )


@pytest.mark.parametrize(
    ("bounds", "objective", "chosen"),
    [
        (["tpot_s<=0.015"], None, "worse"),  # nothing that is as good meets it
        (["quality_kl<=1"], "tpot_s", "worse"),
        (["quality_top1>=0.1"], "tpot_s", "worse"),
        ([], "quality_kl", "good"),
        (["tpot_s<=0.03"], None, "good"),
    ],
)
def test_bounds_decide_before_what_is_as_good_as_the_model(
    bounds: list[str], objective: str | None, chosen: str
) -> None:
    rows = [
        row("worse", tpot_s=0.01, quality_kl=0.5, quality_top1=0.7),
        row("good", tpot_s=0.02, quality_kl=0.001, quality_top1=0.99),
    ]
    made = choose(rows, HOST, parse_slo(bounds, objective)).chosen
    assert made is not None and made["variant"] == chosen


def test_what_was_never_measured_is_neither_left_out_nor_a_reason_to_leave_others_out() -> None:
    unmeasured = row("unmeasured", machine_digest=NOWHERE, status="undecided", tpot_s=None, quality_kl=None)
    worse = row("worse", machine_digest="there", quality_kl=0.5, quality_top1=0.7)
    good = row("good", machine_digest="there", tpot_s=0.02, quality_top1=1.0)
    assert choose([unmeasured, worse], HOST, parse_slo([], None)).chosen is worse
    made = choose([unmeasured, worse, good], HOST, parse_slo([], None))
    assert made.chosen is good
    assert made.fallbacks == (unmeasured,)


def test_a_metric_that_is_better_when_larger_is_maximized() -> None:
    rows = [row("a", output_tokens_per_s=50.0), row("b", output_tokens_per_s=90.0)]
    assert choose(rows, HOST, parse_slo([], "output_tokens_per_s")).chosen is rows[1]


def test_an_absent_metric_meets_no_bound() -> None:
    pick = choose([row(energy_j_per_token=None)], HOST, parse_slo(["energy_j_per_token<=1"], None))
    assert pick.chosen is None
    assert pick.candidates[0].reason == "energy_j_per_token is absent, energy_j_per_token<=1 asked"


def test_estimated_energy_meets_no_bound_and_leads_no_choice() -> None:
    estimated = row(energy_j_per_token=0.5, energy_source="model")
    bound = choose([estimated], HOST, parse_slo(["energy_j_per_token<=1"], None))
    led = choose([estimated], HOST, parse_slo([], "energy_j_per_token"))
    assert (bound.chosen, led.chosen) == (None, None)
    assert bound.candidates[0].reason == "energy_j_per_token is only estimated, energy_j_per_token<=1 asked"
    assert led.candidates[0].reason == "energy_j_per_token is only estimated"


def test_nothing_that_meets_gives_the_nearest_and_its_distance() -> None:
    rows = [row("a", tpot_s=0.02), row("b", tpot_s=0.04)]
    pick = choose(rows, HOST, parse_slo(["tpot_s<=0.01"], None))
    assert (pick.chosen, pick.nearest, round(pick.distance, 6)) == (None, rows[0], 1.0)


def test_rows_of_this_machine_go_before_those_of_others() -> None:
    rows = [row("other", machine_digest="there", tpot_s=0.001), row("mine", tpot_s=0.01)]
    pick = choose(rows, HOST, parse_slo([], "tpot_s"))
    assert pick.chosen is rows[1]
    assert "measured on another machine" in pick.candidates[0].reason


def test_rows_of_other_machines_serve_where_there_is_none_of_this() -> None:
    rows = [row("other", machine_digest="there")]
    assert choose(rows, HOST, parse_slo([], "tpot_s")).chosen is rows[0]


def test_dominated_and_failed_rows_are_never_chosen() -> None:
    pick = choose([row(status="dominated"), row(status="infeasible")], HOST, parse_slo([], "tpot_s"))
    assert pick.chosen is None


@pytest.mark.parametrize("text", ["tpot_s", "speed<=1", "tpot_s<=fast", "tpot_s=1", "", "tpot_s<=1e"])
def test_an_slo_that_cannot_be_read_is_told(text: str) -> None:
    with pytest.raises(InputError):
        parse_bound(text)


def test_linux_feature_names_become_llvms() -> None:
    assert llvm_features(["avx512_vnni", "sse4_1", "pni", "abm", "avx2"]) == {
        "avx512vnni",
        "sse4.1",
        "sse3",
        "lzcnt",
        "avx2",
    }
