"""Artifacts of one model for several CPUs in one catalog: each host takes the highest tier that it supports."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmbuild.cli.cpus import facts_of
from llmbuild.errors import LoadRefused, NoVariant
from llmbuild.runtime import host, reader
from llmbuild.runtime.choose import HostFacts, choose
from llmbuild.runtime.model import host_facts, load, pick
from llmbuild.spec.machine import NOWHERE
from llmbuild.spec.slo import parse_slo
from tests.conftest import TIERS, Project, llmbuild

CPUS = {"nehalem": "v2", "haswell": "v3", "skylake_avx512": "v4", "zen4": "v4", "neoverse_n1": "arm"}
"""Simulated hosts, and the tier each takes; nehalem has no AVX2, haswell no AVX-512."""


@pytest.mark.parametrize(("cpu", "tier"), CPUS.items())
def test_a_host_takes_the_highest_tier_it_supports_and_is_told_why_not_the_others(
    tiers: Project, cpu: str, tier: str
) -> None:
    facts = facts_of(cpu)
    made = pick(tiers.catalog, "tiny", facts=facts)
    assert made.chosen is not None
    assert made.chosen["target"] == tier
    reasons = {c.row["target"]: c.reason for c in made.candidates}
    assert reasons[tier].startswith("the highest tier; never measured")
    for name in TIERS:
        row = next(c.row for c in made.candidates if c.row["target"] == name)
        lacks = sorted(set(row["target_body"]["requires"]) - facts.features)
        if row["target_body"]["arch"] != facts.arch:
            assert f"is for {row['target_body']['arch']}, this host is {facts.arch}" in reasons[name]
        elif lacks:
            assert f"needs CPU features this host lacks: {' '.join(lacks)}" in reasons[name]


@pytest.mark.parametrize(("cpu", "tier"), CPUS.items())
def test_what_a_simulated_host_takes_is_opened_where_this_cpu_has_it_and_generates(
    tiers: Project, cpu: str, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = facts_of(cpu)
    taken = pick(tiers.catalog, "tiny", facts=facts).chosen
    assert taken is not None
    real = host_facts()
    lacks = set(taken["target_body"]["requires"]) - real.features
    if taken["target_body"]["arch"] != real.arch or lacks:
        with pytest.raises(LoadRefused, match=r"is for aarch64|needs CPU features this host lacks"):
            load(tiers.catalog, variant=taken["variant"])
        return
    monkeypatch.setattr("llmbuild.runtime.model.host_facts", lambda: facts)
    opened = load(tiers.catalog, "tiny")
    assert opened.row["target"] == tier
    assert len(list(opened.tokens([1, 2, 3], 4))) == 4
    assert list(opened.tokens([1, 2, 3], 4)) == list(opened.tokens([1, 2, 3], 4))


def test_a_host_below_the_lowest_tier_is_told_what_it_lacks(tiers: Project) -> None:
    with pytest.raises(NoVariant, match=r"no variant of tiny can be used on this host: .*lacks: .*sse4\.2"):
        pick(tiers.catalog, "tiny", facts=facts_of("x86_64"))


def test_the_tiers_share_one_parameter_archive(tiers: Project) -> None:
    rows = reader.variants(tiers.catalog, "tiny")
    assert {r["target"] for r in rows} == set(TIERS)
    assert len({r["parameters"] for r in rows}) == 1
    assert len({r["artifact"] for r in rows}) == len(TIERS)


def test_a_bound_on_time_is_never_met_by_what_nobody_measured(tiers: Project) -> None:
    with pytest.raises(NoVariant, match="tpot_s is absent, tpot_s<=10 asked; never measured"):
        pick(tiers.catalog, "tiny", ["tpot_s<=10"])
    small = pick(tiers.catalog, "tiny", ["parameter_bytes<=1e9"], facts=facts_of("haswell"))
    assert small.chosen is not None
    assert small.chosen["target"] == "v3"


def test_the_command_picks_for_another_cpu(tiers: Project) -> None:
    done = llmbuild("pick", "-m", "tiny", "--as", "haswell", "--json", "-C", tiers.catalog)
    assert (done.returncode, json.loads(done.stdout)["target"]) == (0, "v3"), done.stderr
    assert "needs CPU features this host lacks: avx512bw" in done.stderr
    unknown = llmbuild("pick", "-m", "tiny", "--as", "abacus", "-C", tiers.catalog)
    assert (unknown.returncode, "unknown CPU 'abacus'" in unknown.stderr) == (2, True)


def test_a_bundle_of_tiers_is_published_whole_and_each_host_pulls_its_own(tiers: Project, tmp_path: Path) -> None:
    sent = llmbuild("publish", tmp_path / "bundle", "-C", tiers.catalog)
    assert sent.returncode == 0, sent.stderr
    for cpu, tier in CPUS.items():
        chosen = pick(tmp_path / "bundle", "tiny", facts=facts_of(cpu)).chosen
        assert chosen is not None
        assert chosen["target"] == tier
    pulled = llmbuild("pull", tmp_path / "bundle", "-C", tmp_path / "here")
    assert pulled.returncode == 0, pulled.stderr
    best = max((c for c in TIERS[:3] if runs_here(tiers, c)), key=TIERS.index)
    assert load(tmp_path / "here", "tiny").row["target"] == best


def runs_here(tiers: Project, tier: str) -> bool:
    row = next(r for r in reader.variants(tiers.catalog, "tiny") if r["target"] == tier)
    return row["target_body"]["arch"] == host.architecture() and host.features().issuperset(
        row["target_body"]["requires"]
    )


def test_a_measured_variant_takes_the_place_of_its_compiled_row(tiers: Project, tmp_path: Path) -> None:
    if not runs_here(tiers, "v2"):
        pytest.skip("this host does not run x86-64-v2")
    there = tmp_path / "catalog"
    with sqlite3.connect(tiers.catalog / "catalog.sqlite") as source:
        there.mkdir()
        source.execute("VACUUM INTO ?", (str(there / "catalog.sqlite"),))
    (there / "blobs").symlink_to(tiers.catalog / "blobs")
    done = llmbuild("profile", tiers.recipe, "-t", tiers.folder / "v2.yaml", "-C", there)
    assert done.returncode == 0, done.stderr
    machines = {r["target"]: r["machine_digest"] for r in reader.variants(there, "tiny", everything=True)}
    assert machines["v2"] != NOWHERE
    assert {machines[t] for t in TIERS[1:]} == {NOWHERE}
    chosen = pick(there, "tiny").chosen
    assert chosen is not None
    assert chosen["target"] == "v2", "what was measured on this machine goes before what was not"


# --- the ladder as a function of rows -----------------------------------------------------------------------------

HOST = HostFacts("x86_64", frozenset({"sse4.2", "avx2", "avx512f"}), "3.13.0", None, "here")


def row(variant: str, tier: int, machine: str = NOWHERE, **changes: Any) -> dict[str, Any]:
    requires = ["sse4.2", "avx2", "avx512f"][:tier]
    read = {"tpot_s": None, "peak_memory_bytes": None, "quality_kl": None}
    return {
        "variant": variant,
        "artifact": "a",
        "runtime": "3.13.0",
        "target_body": {"arch": "x86_64", "requires": requires},
        "machine": machine,
        "machine_digest": machine,
        "status": "undecided",
        "reason": "",
        "point": {"kernel": "compiler"},
        "default": False,
        "parameter_bytes": 10,
        "artifact_bytes": 10,
        **read,
        **changes,
    }


def chosen_of(rows: list[dict[str, Any]], bounds: list[str] | None = None, objective: str = "tpot_s") -> str:
    made = choose(rows, HOST, parse_slo(bounds or [], objective))
    assert made.chosen is not None, made.explain()
    return str(made.chosen["variant"])


def test_rows_of_one_other_machine_are_ranked_by_what_was_read_there() -> None:
    rows = [row("high", 3, "there", tpot_s=0.02), row("low", 2, "there", tpot_s=0.01)]
    assert chosen_of(rows) == "low"


def test_of_several_other_machines_the_one_with_the_highest_tier_at_its_head_goes_first() -> None:
    rows = [row("v3", 2, "a", tpot_s=0.001), row("v4", 3, "b", tpot_s=0.02), row("v4 slow", 3, "b", tpot_s=0.03)]
    made = choose(rows, HOST, parse_slo([], "tpot_s"))
    assert made.chosen is rows[1]
    assert made.candidates[1].reason == "read on another machine (b)"
    assert [r["variant"] for r in made.fallbacks] == ["v4 slow", "v3"]


def test_the_choices_of_the_best_row_are_taken_up_a_tier_that_nobody_measured() -> None:
    point = {"kernel": "own"}
    rows = [
        row("v3 own", 2, "a", tpot_s=0.001, point=point),
        row("v3", 2, "a", tpot_s=0.01),
        row("v4 own", 3, point=point),
        row("v4", 3, default=True),
    ]
    assert chosen_of(rows) == "v4 own"
    assert chosen_of(rows, ["tpot_s<=0.1"]) == "v3 own"
    assert chosen_of(rows[:2] + rows[3:]) == "v3 own"


def test_where_nothing_was_read_the_highest_tier_goes_with_the_compilers_defaults() -> None:
    rows = [row("v3", 2, default=True), row("v4 small", 3, parameter_bytes=1), row("v4", 3, default=True)]
    assert chosen_of(rows) == "v4"
    assert chosen_of(rows, ["parameter_bytes<=5"]) == "v4 small"


def test_a_row_read_here_goes_before_every_other_tier() -> None:
    rows = [row("mine", 1, "here", tpot_s=0.5), row("v4", 3, "there", tpot_s=0.01), row("unread", 3)]
    made = choose(rows, HOST, parse_slo([], "tpot_s"))
    assert made.chosen is rows[0]
    assert [c.reason for c in made.candidates[1:]] == [
        "was measured on another machine (there)",
        "never measured: `llmbuild profile` on this host does",
    ]


def test_archspecs_features_are_those_the_compiler_asks_for() -> None:
    for cpu in ("x86_64_v2", "x86_64_v3", "x86_64_v4"):
        assert facts_of(cpu).arch == "x86_64"
    assert {"avx2", "fma", "bmi", "lzcnt"} <= facts_of("haswell").features
    assert not {f for f in facts_of("haswell").features if f.startswith("avx512")}
    assert {"dotprod", "neon"} <= facts_of("neoverse_n1").features
    assert replace(facts_of("zen4"), machine="here").machine == "here"
