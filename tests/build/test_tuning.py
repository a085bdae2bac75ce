from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmbuild.build.compiling import Compiling
from llmbuild.build.targets import find_target
from llmbuild.build.tune import Tuner
from llmbuild.catalog.phases import Tuned, record_tuning, winners, winners_of
from llmbuild.catalog.writer import Catalog
from llmbuild.compiler import dispatches, iree
from llmbuild.compiler.dispatches import configurations, configure, products
from llmbuild.errors import CatalogError, InputError
from llmbuild.process.child import Limits
from llmbuild.runtime import reader
from llmbuild.search.knobs.space import KNOBS, with_tuning
from llmbuild.spec.space import TUNING, Space
from llmbuild.spec.variant import Artifact, Failure
from tests.conftest import Project, llmbuild

SETTINGS = {k.name: k.default for k in KNOBS if k.level == "codegen"} | {"opt_level": "O2"}

TWO_LAYERS = """\
func.func @step(%x: tensor<96xf32>, %a: tensor<96x96xf32>, %b: tensor<96x96xf32>,
    %c: tensor<96x?xf32>, %y: tensor<?xf32>) -> tensor<96xf32> {
  %zero = arith.constant 0.0 : f32
  %0 = tensor.empty() : tensor<96xf32>
  %1 = linalg.fill ins(%zero : f32) outs(%0 : tensor<96xf32>) -> tensor<96xf32>
  %2 = linalg.matvec ins(%a, %x : tensor<96x96xf32>, tensor<96xf32>) outs(%1 : tensor<96xf32>) -> tensor<96xf32>
  %3 = math.tanh %2 : tensor<96xf32>
  %4 = linalg.matvec ins(%b, %3 : tensor<96x96xf32>, tensor<96xf32>) outs(%1 : tensor<96xf32>) -> tensor<96xf32>
  %5 = linalg.matvec ins(%c, %y : tensor<96x?xf32>, tensor<?xf32>) outs(%4 : tensor<96xf32>) -> tensor<96xf32>
  return %5 : tensor<96xf32>
}
"""


@pytest.fixture
def compiling(tmp_path: Path) -> Compiling:
    target = iree.resolve(find_target("host"))
    return Compiling(Catalog(tmp_path / "catalog"), target, "test", Limits(seconds=120), lambda _: False)


def front_text(compiling: Compiling, source: str, tmp_path: Path) -> str:
    path = tmp_path / "module.mlir"
    path.write_text(source)
    front = compiling.front(compiling.catalog.blobs.put_file(path), SETTINGS)
    assert not isinstance(front, Failure)
    return compiling.plain_text(front)


def test_products_with_static_shapes_are_found_with_their_loops(compiling: Compiling, tmp_path: Path) -> None:
    found = products(front_text(compiling, TWO_LAYERS, tmp_path))
    assert {p.bounds for p in found} == {(96, 96)}
    assert all("?" not in "".join(p.operations) for p in found)


def test_a_kind_is_known_again_in_another_model(compiling: Compiling, tmp_path: Path) -> None:
    here = {p.signature for p in products(front_text(compiling, TWO_LAYERS, tmp_path))}
    renamed = TWO_LAYERS.replace("@step", "@other").replace("%a", "%weights").replace("math.tanh", "math.exp")
    there = {p.signature for p in products(front_text(compiling, renamed, tmp_path))}
    assert here & there
    other = {p.signature for p in products(front_text(compiling, TWO_LAYERS.replace("96", "80"), tmp_path))}
    assert not here & other


def test_every_configuration_compiles_and_changes_the_code(compiling: Compiling, tmp_path: Path) -> None:
    text = front_text(compiling, TWO_LAYERS, tmp_path)
    kinds = products(text)
    options = configurations(kinds[0])
    assert len(options) > 5 and len(set(options)) == len(options)
    made = set()
    for number in (0, len(options) // 2, len(options) - 1):
        chosen = configure(text, {p.signature: configurations(p)[number] for p in kinds})
        translated = compiling.translated_text(chosen, SETTINGS)
        assert not isinstance(translated, Failure), translated.log
        artifact = compiling.emitted(translated, SETTINGS)
        assert isinstance(artifact, Artifact), artifact.log
        made.add(artifact.digest)
    assert len(made) == 3


def test_nothing_chosen_leaves_the_text_as_it_is(compiling: Compiling, tmp_path: Path) -> None:
    text = front_text(compiling, TWO_LAYERS, tmp_path)
    assert configure(text, {}) == text


def test_what_won_is_named_by_content_and_used_by_a_compile(compiling: Compiling, tmp_path: Path) -> None:
    catalog = compiling.catalog
    kind = products(front_text(compiling, TWO_LAYERS, tmp_path))[0]
    assert winners_of(catalog, "t", "c") == ""
    inputs = {"signature": kind.signature, "target": "t", "compiler": "c"}
    record_tuning(catalog, "k", inputs, Tuned(configurations(kind)[0], 1.5, ()))
    name = winners_of(catalog, "t", "c")
    assert winners_of(catalog, "other", "c") == ""
    assert winners(catalog, name) == {kind.signature: configurations(kind)[0]}
    module = catalog.blobs.put_file(tmp_path / "module.mlir")
    plain, tuned = (compiling.compile(module, {**SETTINGS, TUNING: t}) for t in ("none", name))
    assert isinstance(plain, Artifact) and isinstance(tuned, Artifact)
    assert plain.digest != tuned.digest
    with pytest.raises(CatalogError, match="no tuning"):
        winners(catalog, "0" * 12)


def test_a_space_takes_up_what_a_catalog_holds_unless_it_is_pinned() -> None:
    space = Space(KNOBS)
    domain = {k.name: k.domain for k in with_tuning(space, "abc", ()).knobs}[TUNING]
    assert domain == ("none", "abc")
    assert with_tuning(space, "abc", {TUNING}) == space
    assert with_tuning(space, "", ()) == space


def test_tuning_a_built_variant_is_told_kept_and_not_done_twice(
    built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = tmp_path / "catalog"  # what is kept makes builds stale: other tests' catalog stays as it is
    shutil.copytree(built.catalog, catalog)
    pins = ("--set", "kernel=compiler", "--set", "opt_level=O2", "--trials", "2")
    assert llmbuild("build", built.recipe, "-C", catalog, *pins).returncode == 0
    monkeypatch.setattr(dispatches, "ROWS", (1,))
    monkeypatch.setattr(dispatches, "DEPTHS", (16,))
    rows = reader.variants(catalog, "tiny", everything=True)
    theirs = [r for r in rows if r["artifact"] and r["point"]["kernel"] == "compiler"]
    variants = {r["point"]["opt_level"]: r["variant"] for r in theirs}
    with pytest.raises(InputError, match="opt_level=O0"):
        Tuner(catalog, variants["O0"], lambda _: None).run()
    variant = variants["O2"]
    first = Tuner(catalog, variant, lambda _: None).run()
    assert first.kinds
    assert all(k.tried > 0 and not k.known and k.after_s <= k.before_s for k in first.kinds)
    assert [k.before_s for k in first.kinds] == sorted((k.before_s for k in first.kinds), reverse=True)
    second = Tuner(catalog, variant, lambda _: None).run()
    known = {k.dispatch for k in second.kinds if k.known}
    assert known >= {k.dispatch for k in first.kinds} & {k.dispatch for k in second.kinds}


def test_our_own_kernels_have_nothing_to_tune(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"variant": "f" * 64, "artifact": "e" * 64, "point": {"kernel": "own"}}
    monkeypatch.setattr(reader, "find_variant", lambda *_: [own])
    with pytest.raises(InputError, match="no code of the compiler's to tune"):
        Tuner(built.catalog, "f", lambda _: None)


def test_the_command_line_tells_what_there_is_to_tune(built: Project) -> None:
    done = llmbuild("tune", "no-such-variant", "-C", built.catalog)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_fronts_of_other_models_are_found_and_ones_own_is_not(built: Project) -> None:
    rows = reader.variants(built.catalog, "tiny", everything=True)
    front = {tuple(sorted(r["point"].items())) for r in rows if r["status"] == "pareto"}
    catalog = Catalog(built.catalog)
    try:
        targets = {r["target_digest"] for r in rows}
        assert {p.values for p in catalog.fronts_elsewhere("another", "another")} == front
        assert [catalog.fronts_elsewhere("tiny", of) for of in targets] == [[]]
        (told,) = catalog.trials_elsewhere("another", "llvm-cpu", 4)
        assert {t.point.values for t in told if t.measurements} >= front
        assert catalog.trials_elsewhere(told[0].scope, "llvm-cpu", 4) == []
        assert catalog.trials_elsewhere("another", "cuda", 4) == []
    finally:
        catalog.close()
