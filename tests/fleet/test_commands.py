"""`llmbuild plan`, `simulate` and `orchestrate`: data on stdout, exit codes, and one message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llmbuild.cli.fleet import orchestrate, plan, simulate
from llmbuild.cli.main import main
from llmbuild.errors import LlmbuildError
from llmbuild.process import rays
from tests.fleet.test_files import TEXT


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def run(*words: str | Path) -> Result:
    return CliRunner().invoke({"plan": plan, "simulate": simulate}[str(words[0])], [str(word) for word in words[1:]])


def test_a_plan_is_a_document_with_its_basis_and_bound(fleet: Path) -> None:
    done = run("plan", fleet, "--json")
    found = json.loads(done.stdout)
    assert (done.exception, found["feasible"], found["basis"]) == (None, True, "estimated")
    assert found["bound"] <= found["cost"] * (1 + 1e-6)
    assert [a["basis"] for a in found["assignments"]] == ["decode published, prompt estimated, power published"]
    assert all("@" in a["source"] for a in found["assignments"])


def test_a_load_without_a_place_exits_with_3_and_says_what_is_missing(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", str(fleet), "--rate", "x100"])
    out, told = capsys.readouterr()
    assert exit_.value.code == 3
    assert "more of a would take it" in told
    assert "weighted by priority" in out


def test_a_plan_says_its_layouts_and_what_the_best_without_partitions_costs() -> None:
    shipped = Path(__file__).parents[2] / "recipes" / "fleets" / "mig.yaml"
    found = json.loads(run("plan", shipped, "--json", "--without", "a100", "--without", "h100-3").stdout)
    assert found["feasible"] and found["basis"] == "estimated"
    assert sum(each["nodes"] for each in found["layouts"]["h100"]) == found["nodes"]["h100"] == 1
    assert {a["slice"] for a in found["assignments"]} == {"1g.20gb"}
    assert all(a["source"].startswith("estimated, 1g.20gb by 0.25 of the bandwidth") for a in found["assignments"])
    assert found["without_partitions"]["feasible"] is False  # four services, three GPUs


def test_a_plan_says_that_layouts_stay_where_they_must_not_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "divided.yaml"
    path.write_text(TEXT.replace("memory: 80GB", "memory: 80GB\n    partitions: {gpu: H100-80GB, change: direct}"))
    told = run("plan", path).stdout
    assert "all stay 7g.80gb: add `actuators: [set_partition]` for others" in told
    assert "without partitions: 1 a" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--without", "b"), "no such node or class: there are a-0 to a-1"),
        (("--rate", "2"), "write x2 or x0.5"),
    ],
)
def test_a_wrong_option_of_a_plan_is_told(fleet: Path, words: tuple[str, ...], told: str) -> None:
    done = run("plan", fleet, *words)
    assert told in (str(done.exception) if isinstance(done.exception, LlmbuildError) else done.output)


def test_without_a_node_there_is_one_less(fleet: Path) -> None:
    whole, less = (json.loads(run("plan", fleet, "--json", *words).stdout) for words in ((), ("--without", "a-1")))
    assert whole["nodes"] == less["nodes"] == {"a": 1}
    assert run("plan", fleet, "--without", "a").exception is not None


def test_a_simulation_is_a_document_for_each_run_and_the_same_each_time(fleet: Path) -> None:
    words = ("simulate", fleet, "--trace", "steady", "--seconds", "60", "--seeds", "2")
    words = (*words, "--policy", "static-mean", "--policy", "oracle", "--json")
    first, second = (json.loads(run(*words).stdout) for _ in range(2))
    assert [(one["policy"], one["seed"]) for one in first] == [
        ("static-mean", 0),
        ("oracle", 0),
        ("static-mean", 1),
        ("oracle", 1),
    ]
    for one in (*first, *second):
        one.pop("decide_s")
    assert first == second


def test_what_energy_emits_and_costs_is_told_with_its_basis(fleet: Path) -> None:
    keys = "{carbon: {0: 360}, price: {0: 0.25}, basis: published, source: here}"
    fleet.write_text(f"{TEXT}electricity: {keys}\n")
    found = json.loads(run("plan", fleet, "--json").stdout)
    assert found["co2e_g_per_h"] == pytest.approx(found["watts"] * 0.36)
    assert (found["electricity_per_h"], found["tariff_basis"]) == (pytest.approx(found["watts"] * 0.00025), "published")
    assert "an hour in the mean of a day; basis: published" in run("plan", fleet).stdout
    words = ("simulate", fleet, "--trace", "steady", "--seconds", "60", "--seeds", "1", "--policy", "static-mean")
    (one,) = json.loads(run(*words, "--json").stdout)
    assert one["co2e_g"] == pytest.approx(sum(one["joules"].values()) / 3.6e6 * 360)
    head = run(*words).stdout.splitlines()[0]
    assert "CO2e g (published)" in head and "electricity (published)" in head


def test_a_table_has_a_row_for_each_policy_and_stderr_says_what_was_done_to_the_trace(fleet: Path) -> None:
    trace = fleet.with_name("trace.jsonl")
    lines = [json.dumps({"timestamp": i * 500, "input_length": 400, "output_length": 20}) for i in range(60)]
    trace.write_text("\n".join(lines))
    done = run("simulate", fleet, "--trace", trace, "--rate", "x0.5", "--policy", "static-peak", "--seeds", "1")
    assert done.stdout.splitlines()[1].split()[0] == "static-peak"
    assert "thinned: CV of gaps 0.0 before" in done.stderr
    assert "static-peak: knows the trace's peak and lengths" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--trace", "nowhere.csv"), "no such trace"),
        (("--trace", "steady", "--policy", "clever"), "no policy 'clever'"),
        (("--trace", "steady", "--fail", "a-0"), "write NODE@SECONDS"),
        (("--trace", "steady", "--fail", "b-0@3"), "nodes are a-0 to a-1"),
        (("--trace", "steady", "--lengths", "x2"), "change them there"),
        (("--trace", "other=x.csv"), "no service 'other': there are llama-3-8b"),
    ],
)
def test_a_mistake_of_a_simulation_is_told(fleet: Path, words: tuple[str, ...], told: str) -> None:
    done = run("simulate", fleet, *words)
    assert isinstance(done.exception, LlmbuildError)
    assert told in str(done.exception)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--on", "kubernetes", "-n"), "fleet small says nothing of Kubernetes: give `kubernetes: {image"),
        (("--on", "kubernetes", "-n", "--context", "a"), "--context goes with --on kubernetes, and without -n"),
        (("--kubeconfig", "a"), "--kubeconfig goes with --on kubernetes"),
        (("--inference-pool", "a"), "--inference-pool goes with --on kubernetes -n"),
        (("--json",), "--json goes with -n"),
        (("-n", "--policy", "oracle"), "knows the trace"),
        (("-n", "--policy", "none"), "no policy 'none'"),
        (("-n",), "are not this machine"),
    ],
)
def test_what_cannot_be_run_is_refused_with_one_message(
    fleet: Path, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    done = CliRunner().invoke(orchestrate, [str(fleet), *words, "-C", str(tmp_path)])
    assert told in str(done.exception), (done.output, done.exception)


@pytest.mark.parametrize("dry", [(), ("-n",)])
def test_ray_that_is_not_installed_is_one_message(
    fleet: Path, tmp_path: Path, dry: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rays, "find_spec", lambda name: None)
    done = CliRunner().invoke(orchestrate, [str(fleet), "--on", "ray", *dry, "-C", str(tmp_path)])
    assert str(done.exception) == "Ray is not installed: pip install 'llmbuild[ray]'"


def test_a_backend_that_is_none_is_refused_with_those_that_are(fleet: Path) -> None:
    done = CliRunner().invoke(orchestrate, [str(fleet), "--on", "slurm"])
    assert "'slurm' is none of local, kubernetes, ray and ray://HOST:PORT" in done.output
