"""What does not go with a model is no point of its space, or that point's failure; what is pinned is at every point."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.catalog.writer import Catalog, Owner
from llmbuild.errors import InputError
from llmbuild.kernels.applies import cpu_problem
from llmbuild.kernels.choose import readable
from llmbuild.profiler import heldout
from llmbuild.report.rows import front_table
from llmbuild.runtime import reader
from llmbuild.runtime.tokenizer import Tokenizer
from llmbuild.search.knobs import refusals as judging
from llmbuild.search.knobs.refusals import Refusal, refusals
from llmbuild.search.knobs.space import KNOBS, space_for
from llmbuild.search.warm_start import initial_points
from llmbuild.spec.model import facts_of
from llmbuild.spec.recipe import Calibration, Text
from llmbuild.spec.space import Point
from llmbuild.spec.trial import Trial
from llmbuild.spec.variant import Failure
from tests.conftest import Project, llmbuild
from tests.frontend.test_facts import configurations
from tests.search.test_space import AVX2, recipe
from tests.support import synthetic, tiny

OURS = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")
TARGETS = (AVX2, replace(AVX2, requires=OURS), replace(AVX2, requires=("dotprod",)), replace(AVX2, requires=()))
ODD: dict[str, Any] = {"hidden_act": "mish"}
"""What no kernel of ours computes."""

FEW: dict[str, Any] = {"opt_level": ("O2",), "workers": (0,), "driver": ("local-sync",), "data_tiling": ("off",)}
FEW |= {"distribution_size": (64,), "split_reduction": (False,)}
"""Knobs that have nothing to do with a model, narrowed."""


@settings(max_examples=60)
@given(configurations(), st.sampled_from(TARGETS), st.booleans(), st.booleans())
def test_the_space_of_a_model_is_no_exception_and_has_our_kernels_where_they_apply(
    config: dict[str, Any], target: Any, tokenizer: bool, calibrated: bool
) -> None:
    facts = facts_of(config)
    asked = replace(recipe(**FEW), calibration=Calibration((Text(("ast",)),)) if calibrated else None)
    space = space_for(target, asked, {}, 2, refusals(target, facts, "" if tokenizer else "no tokenizer"))
    points = list(space.points())
    formats = {(p["weight_format"], p["head_format"]) for p in points if p["kernel"] == "own"}
    assert all(not cpu_problem(facts.decoder, form, form if head == "same" else head) for form, head in formats)
    able = [form for form in ("int8", "f16") if form in readable(target.requires)]
    assert {form for form in able if not cpu_problem(facts.decoder, form, form)} <= {form for form, _ in formats}
    assert tokenizer or not [p for p in points if (p["quantization"], p["scaling"]) != ("rtn", "none")]
    assert all(space.contains(p) or p == space.default() for p in initial_points(space))


@settings(max_examples=100)
@given(st.data())
def test_every_point_to_begin_with_has_what_is_pinned(data: st.DataObject) -> None:
    knobs = data.draw(st.lists(st.sampled_from(KNOBS), min_size=1, max_size=3, unique_by=lambda k: k.name))
    pins = {k.name: str(data.draw(st.sampled_from(k.domain), k.name)) for k in knobs}
    target = replace(AVX2, requires=(*AVX2.requires, "sve"))
    try:
        space = space_for(target, replace(recipe(), calibration=Calibration((Text(("ast",)),))), pins)
    except InputError:  # told by name: see the next tests
        return
    first, *others = initial_points(space)
    assert first == space.default()
    chosen = others or [first]
    assert [{name: str(p[name]) for name in pins} for p in chosen] == [pins] * len(chosen)
    assert all(space.contains(p) for p in others)


def test_pins_that_rule_each_other_out_are_told_by_name() -> None:
    with pytest.raises(InputError, match=r"knob kernel=own needs layout to be packed, not row_major"):
        space_for(AVX2, recipe(), {"kernel": "own", "layout": "row_major"})
    with pytest.raises(InputError, match=r"knob workers=1 needs driver to be local-task, not local-sync"):
        space_for(AVX2, recipe(driver=("local-sync",)), {"workers": "1"})


def test_a_pin_that_a_model_rules_out_is_told_with_the_reason() -> None:
    refused = refusals(AVX2, facts_of({"model_type": "llama", "vocab_size": 320, **ODD}))
    assert [(r.knob, r.value, r.beside) for r in refused] == [("kernel", "own", ())]
    with pytest.raises(InputError, match=r"knob kernel=own: its own kernels compute"):
        space_for(AVX2, recipe(), {"kernel": "own"}, refused=refused)
    domains = {k.name: k.domain for k in space_for(AVX2, recipe(kernel=("own", "compiler")), {}, 2, refused).knobs}
    assert domains["kernel"] == ("compiler",)
    mute = refusals(AVX2, facts_of({"model_type": "llama"}), heldout.unfit(Text(("ast",)), None, 64, 320))
    calibrated = replace(recipe(), calibration=Calibration((Text(("ast",)),)))
    with pytest.raises(InputError, match=r"knob quantization=gptq: the model has no tokenizer.json"):
        space_for(AVX2, calibrated, {"quantization": "gptq"}, refused=mute)


def test_text_that_makes_no_window_is_told_before_anything_is_made(project: Project, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def pop(self):")
    where, asked = tmp_path / "short.yaml", project.recipe.read_text()
    texts = f"file: {tmp_path / 'short.txt'}"
    asked = asked.replace("./model", str(project.model)).replace("./heldout.txt", str(project.folder / "heldout.txt"))
    where.write_text(f"{asked}calibration: {{text: {{{texts}}}}}\n")
    told = r"calibration text: \d+ tokens are fewer than one window of 32"
    dry = llmbuild("build", where, "-n", "-C", tmp_path / "catalog")
    left_out = re.findall(rf"left out for this model: ([\w+=]+): {told}", dry.stderr)
    assert (dry.returncode, left_out) == (0, [f"{knob}={value}" for knob, value in judging.CALIBRATED])
    listed = json.loads(llmbuild("recipes", tmp_path, "--json").stdout)
    assert [bool(re.search(told, row["left_out"])) for row in listed] == [True]
    pinned = llmbuild("build", where, "-n", "--set", "quantization=gptq", "-C", tmp_path / "catalog")
    assert (pinned.returncode, bool(re.match(f"error: knob quantization=gptq: {told}", pinned.stderr))) == (2, True)
    where.write_text(asked.replace(str(project.folder / "heldout.txt"), str(tmp_path / "short.txt")))
    unscored = llmbuild("build", where, "-n", "-C", tmp_path / "catalog")
    bounds = "quality_kl<=0.05, quality_top1>=0.9"
    told = rf"note: tiny: {bounds} will not be judged: quality is absent: the held-out text: \d+ tokens are fewer than"
    assert (unscored.returncode, len(re.findall(told, unscored.stderr))) == (0, 1)


@settings(max_examples=30)
@given(st.integers(0, 40), st.integers(1, 64), st.integers(250, 330))
def test_text_fits_where_windows_can_be_cut_of_it(project: Project, words: int, context: int, vocabulary: int) -> None:
    path, tokenizer = project.folder / "drawn.txt", project.model / "tokenizer.json"
    path.write_text("def push " * words)
    text = Text(files=(str(path),))
    ids = Tokenizer(tokenizer).encode(path.read_text()).ids
    fits = len(ids) >= min(heldout.WINDOW, context) and max(ids) < vocabulary
    assert (heldout.unfit(text, tokenizer, context, vocabulary) == "") == fits
    if fits:
        assert heldout.cut(text, 1, min(heldout.WINDOW, context), tokenizer).max() < vocabulary


def test_a_format_that_our_kernels_do_not_read_of_a_model_is_left_to_the_compiler() -> None:
    refused = (Refusal("kernel", "own", "of odd widths", (("weight_format", "int8"),)),)
    space = space_for(AVX2, recipe(**FEW), {}, 2, refused)
    own = {p["weight_format"] for p in space.points() if p["kernel"] == "own"}
    assert own == {"f16", "int4_g128"}
    with pytest.raises(InputError, match=r"knob kernel=own with weight_format=int8: of odd widths"):
        space_for(AVX2, recipe(), {"kernel": "own", "weight_format": "int8"}, 2, refused)


def test_a_point_that_the_import_refuses_is_its_failure_and_no_end(project: Project, tmp_path: Path) -> None:
    from llmbuild.build.jobs import job_of
    from llmbuild.build.request import BuildRequest
    from llmbuild.build.steps import Steps

    job = job_of(project.recipe, "host", BuildRequest(dry_run=True))
    catalog = Catalog(tmp_path / "catalog")
    steps = Steps(job, catalog)
    try:
        odd = Point.of({**job.space.default().as_dict(), "kernel": "own", "weight_format": "f16"})
        made = steps.import_(odd)
    finally:
        steps.close()
        catalog.close()
    assert isinstance(made, Failure)
    assert (made.stage, made.lasting) == ("import", True)
    assert made.reason == "kernel=own reads weights in layout=packed; choose it too"
    assert made.command.startswith("echo ") and '"kernel": "own"' in made.command


def test_what_a_model_rules_out_is_told_before_anything_is_made(tmp_path: Path) -> None:
    tiny.write(tmp_path / "model")
    where = tmp_path / "mute.yaml"
    where.write_text(
        "name: mute\nmodel:\n  huggingface: ./model\nworkloads:\n  - {name: short, prompt: 8, output: 8, context: 32}\n"
        "objectives: [tpot_s]\ncalibration: {text: {stdlib: [ast]}}\n"
    )
    dry = llmbuild("build", where, "-n", "--json", "-C", tmp_path / "catalog")
    told = "quantization=gptq: the model has no tokenizer.json to read calibration text with"
    assert (dry.returncode, dry.stderr.count(f"left out for this model: {told}")) == (0, 1)
    listed = json.loads(llmbuild("recipes", tmp_path, "--json").stdout)
    assert [told in r["left_out"] for r in listed] == [True]
    pinned = llmbuild("build", where, "-n", "--set", "quantization=gptq", "-C", tmp_path / "catalog")
    assert (pinned.returncode, pinned.stderr.startswith(f"error: knob {told}")) == (2, True)


def test_the_knobs_say_what_they_ask_of_a_model() -> None:
    from llmbuild.report.knobs import knob_rows

    when = {row["knob"]: row["when"] for row in knob_rows(AVX2)}
    assert "own asks of a model sizes, activation and norms that llmbuild's kernels support" in when["kernel"]
    assert "gptq asks of a model a tokenizer.json that makes enough tokens" in when["quantization"]
    assert {knob for knob, _ in judging.ASKED_OF_MODELS} == {k for k, text in when.items() if "asks of a model" in text}


def test_a_point_that_did_not_compile_stands_as_failed_until_it_does(tmp_path: Path) -> None:
    registered = synthetic.fill(tmp_path, [])
    owner = Owner("m", registered.target_digest, registered.toolchain_digest, "lineage", None)
    failure = Failure("compile", "does not legalize", "iree-compile", "log", lasting=True)
    point = Point.of({"weight_format": "int4_g64"})
    failed = Trial("s", 1, point, "asked", False, None, None, None, None, (), failure, 0.0)
    made = replace(failed, variant="made", failure=None)

    def rows() -> list[tuple[str, str, str]]:
        return [(r["variant"], r["status"], r["reason"]) for r in reader.variants(tmp_path, everything=True)]

    catalog = Catalog(tmp_path)
    try:
        for _ in range(2):
            catalog.record_compiled(failed, owner, ["short"], "asked")
            assert rows() == [("asked", "failed", "compile: does not legalize")]
        assert reader.variants(tmp_path) == []
        catalog.record_compiled(made, owner, ["short"], "asked")
        assert rows() == [("made", "undecided", "compiled, and never measured")]
    finally:
        catalog.close()


def test_rows_of_several_models_say_which_each_belongs_to(tmp_path: Path) -> None:
    for model in ("one", "two"):
        synthetic.fill(tmp_path, synthetic.THREE, model)
    rows = reader.variants(tmp_path)
    both, alone = front_table(rows), front_table([r for r in rows if r["model"] == "one"])
    assert both.splitlines()[0].split()[:3] == ["variant", "model", "status"]
    assert {line.split()[1] for line in both.splitlines()[1:]} == {"one", "two"}
    assert alone.splitlines()[0].split()[:2] == ["variant", "status"]
