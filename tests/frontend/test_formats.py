"""Formats and calibration: imports of a tiny model compiled with IREE, and quality of the model that ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.frontend.calibration import Asked, Calibration, read_tokens
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.importer import canonical
from llmbuild.frontend.program import apply, import_model, settle, take
from llmbuild.frontend.source import find_model
from llmbuild.frontend.weights import Source
from llmbuild.kernels.head import HeadShape
from llmbuild.kernels.layouts import FORMATS
from llmbuild.profiler.heldout import check_apart, windows
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.formats import INTEGERS
from llmbuild.spec.program import PARAMETERS_FILE, ImportJob
from llmbuild.spec.recipe import Calibration as Texts
from llmbuild.spec.recipe import Quality, Text
from llmbuild.transform.decoder import packer
from llmbuild.transform.gptq import gptq
from llmbuild.transform.panels import encode, encode_for, unpack
from llmbuild.transform.quantized import dequantize, quantize
from llmbuild.transform.stored import Rows, StoredMatrix, plain
from scripts.bench import quality
from tests.frontend.conftest import ONE, Imports
from tests.support.artifact import archived, relative_error
from tests.support.eager import model_of, source_config

HIDDEN = 64
"""Columns that every format's layout takes."""

RECIPE = Path(__file__).parents[2] / "recipes" / "pystdlib.yaml"
CONTEXT = 32
FITTED = Asked(fitted=True, scaled=False, rounded=frozenset())


@pytest.fixture(scope="module")
def model(imports: Imports) -> Path:
    return imports.model(**ONE)


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_token_table_says_the_weights_it_was_made_from(form: str) -> None:
    """What `unpack` says of it is what the kernel looks up: `tests/kernels/test_look.py`."""
    layout = HeadShape(HIDDEN, 323, 1e-5, 1, form).layout
    dense = np.random.default_rng(0).standard_normal((323, HIDDEN)).astype(np.float32)
    packed = packer(layout)(encode_for(layout, dense))
    values, scale = unpack(layout, *(packed[name].reshape(-1).view(np.uint8) for name in ("data", "scale")))
    assert np.array_equal(plain(encode(form, dense), HIDDEN), (values * scale[:, None])[:323, :HIDDEN])


CALIBRATED = {
    "weight_format": "int4_g32",
    "layout": "packed",
    "head_format": "int4a_g32",
    "mixed": "sensitive",
    "quantization": "gptq",
}


@pytest.mark.parametrize(
    "choices",
    [
        CALIBRATED,
        pytest.param(
            {"weight_format": "f12_e4m7", "layout": "packed", "head_format": "int7_g32"}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            {"weight_format": "int4a_g64", "layout": "row_major", "head_format": "int8"}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            {"weight_format": "int8_g32", "layout": "packed", "head_format": "bf16", "kv_dtype": "int8"},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=lambda c: "-".join(c.values()),
)
def test_an_artifact_computes_what_pytorch_does(imports: Imports, model: Path, choices: dict[str, str]) -> None:
    made = imports(model, choices, context=CONTEXT)
    actual, expected, noise = made.checked(made.at())
    tolerance = 1e-2 if choices.get("kv_dtype") == "int8" else 0.0  # a code of the cache may round the other way
    assert relative_error(actual, expected) < max(1e-5, 10 * noise, tolerance)


def test_the_same_calibration_gives_the_same_bytes(imports: Imports, model: Path, tmp_path: Path) -> None:
    first, job = imports(model, CALIBRATED, context=CONTEXT).result, imports.job(model, CALIBRATED, context=CONTEXT)
    assert first == digest.plain(import_model(job, tmp_path))


def test_four_bits_take_half_a_byte(imports: Imports, model: Path) -> None:
    job = imports.job(model, {"weight_format": "int4_g32"}, context=CONTEXT)
    built = take(job, settle(job)).skeleton
    count = sum(part.numel() for part in built.model.parameters())
    with built.mode:
        apply(built.model, job, settle(job), Formats("int4_g32", "int4_g32"))
    names = canonical(built.model)
    tensors = dict([*built.model.named_parameters(), *built.model.named_buffers()])
    assert 0.5 * count < sum(tensors[name].nbytes for name in {*names.values()}) < 0.7 * count


def test_calibrated_weights_are_what_is_stored(imports: Imports, model: Path) -> None:
    choices, layer = {"weight_format": "int4_g32", "quantization": "gptq"}, "model.layers.0.mlp.down_proj"
    weights, config, tokens = model_of(model), source_config(model), np.load(imports.tokens())
    formats, calibration, asked = Formats("int4_g32", "int4_g32"), Calibration(config, weights, tokens), FITTED
    with torch.no_grad():
        tables = calibration.tables(formats, asked)
        source = Source(weights, formats, tables)
        vectors = plain(tables.ready["lm_head"], weights.shape("lm_head.weight")[1])
        (patch,) = calibration.layers(source, lambda token: vectors[token : token + 1], asked, 0, {})
    fitted, dense = patch.ready[layer], weights.whole(f"{layer}.weight")
    nearest = quantize(dense, INTEGERS["int4_g32"])
    assert not np.array_equal(nearest.codes, fitted.codes)
    stored = StoredMatrix(Rows((("", len(dense)),)), dense.shape[1], "int4_g32")
    for method, expected in (("gptq", fitted), ("rtn", nearest)):
        made = imports(model, {**choices, "quantization": method}, context=CONTEXT)
        held = archived(made.folder / PARAMETERS_FILE)
        for name, array in stored.encode(expected).items():
            assert held[f"{layer}.matrix.{name}"] == array.tobytes(), method


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"weight_format": "f16", "quantization": "gptq"}, "rounds weights to integers"),
        ({"weight_format": "int8", "mixed": "sensitive"}, "weight_format is int8"),
        ({"weight_format": "int4_g32", "quantization": "gptq"}, "need calibration text"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(
    model: Path, tmp_path: Path, choices: dict[str, str], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        import_model(ImportJob(str(model), CONTEXT, choices=tuple(choices.items())), tmp_path)


def test_calibration_tokens_are_checked(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.ones((2, 4)))
    (tmp_path / "text.npy").write_text("no array")
    for name, told in (("floats.npy", "must be i64"), ("text.npy", "cannot be read"), ("none.npy", "cannot be read")):
        with pytest.raises(InputError, match=told):
            read_tokens(str(tmp_path / name))


def test_calibration_text_must_not_be_the_quality_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="heapq is quality text too"):
        check_apart(Texts((Text(("ast", "heapq")),)), Quality(("heapq",)))
    copy = tmp_path / "copy.py"
    copy.write_text(Path(np.__file__).read_text())
    with pytest.raises(InputError, match="100% of the quality text's lines"):
        check_apart(Texts((Text(files=(str(copy),)),)), Quality(files=(np.__file__,)))
    with pytest.raises(InputError, match="100% of the quality text's lines"):
        check_apart(Texts((Text(("ast",)), Text(chats=str(copy)))), Quality(files=(np.__file__,)))
    check_apart(Texts((Text(("ast",)),)), Quality(("heapq",)))


@pytest.mark.parametrize("name", ["int8", "int4_g32", "int4a_g64"])
def test_outputs_are_nearer_than_with_rounding_to_nearest(name: str) -> None:
    drawn = np.random.default_rng(0)
    inputs = (drawn.standard_normal((400, 16)) @ drawn.standard_normal((16, 96))).astype(np.float32)
    dense = drawn.standard_normal((40, 96)).astype(np.float32)
    fitted, nearest = gptq(dense, inputs.T @ inputs, INTEGERS[name]), quantize(dense, INTEGERS[name])
    errors = [np.square(inputs @ (dequantize(q) - dense).T).sum() for q in (fitted, nearest)]
    assert errors[0] < 0.5 * errors[1]
    assert fitted.scale.shape == nearest.scale.shape


def test_inputs_that_never_occur_are_rounded_all_the_same() -> None:
    dense = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for hessian in (np.zeros((64, 64), np.float32), np.diag(np.repeat([1.0, 0.0], 32)).astype(np.float32)):
        fitted = gptq(dense, hessian, INTEGERS["int4_g32"])
        assert np.isfinite(dequantize(fitted)).all()
        assert np.abs(dequantize(fitted) - dense).max() < 0.7


@pytest.mark.skipif(not (RECIPE.parent / "pystdlib" / "model.safetensors").exists(), reason="the model is not here")
def test_calibration_wins_back_a_good_part_of_what_four_bits_cost() -> None:
    recipe = read_recipe(RECIPE)
    assert recipe.calibration
    folder = Path(recipe.model.location)
    scored = windows(recipe.quality, folder / "tokenizer.json", 128)
    calibration = quality.tokens_of(recipe, find_model(recipe.model))
    config, weights = source_config(folder), model_of(folder)
    with torch.inference_mode():
        exact, *told = (
            quality.log_probabilities(config, weights, case, calibration, scored)[0]
            for case in (quality.Case("f32", "f32"), *(quality.Case("int4_g64", "int8", m) for m in ("rtn", "gptq")))
        )
    nearest, fitted = (float((exact.exp() * (exact - now)).sum(-1).mean()) for now in told)
    assert fitted < 0.65 * nearest
