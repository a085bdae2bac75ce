"""Bits shared out among a model's matrices by what a text shows, imported and held against PyTorch."""

from __future__ import annotations

import pytest

from llmbuild.errors import ChoiceRefused
from llmbuild.frontend.own import KINDS, others
from llmbuild.frontend.program import calibrate, formats_of, settle, take
from tests.frontend.conftest import ONE, TWO, Imports
from tests.frontend.test_frontend import CONTEXT, FEATURES, OWN, needs_vnni
from tests.support.artifact import relative_error

SHARED_OUT = {**OWN, "weight_format": "int5_g32", "allocation": "sensitive", "quantization": "gptq"}


@needs_vnni
def test_bits_shared_out_among_matrices_are_what_the_artifact_reads(imports: Imports) -> None:
    made = imports(imports.model(**TWO), SHARED_OUT, context=CONTEXT, features=FEATURES)
    actual, expected, noise = made.checked(made.at("O2"))
    assert relative_error(actual, expected) < max(1e-5, 10 * noise)


@needs_vnni
def test_bits_are_shared_out_by_what_rounding_each_matrix_does(imports: Imports) -> None:
    model = imports.model(**TWO)
    job = imports.job(model, SHARED_OUT, context=CONTEXT, features=FEATURES)
    taken, choices = take(job, settle(job)), settle(job)
    calibrated = calibrate(taken, job, choices)
    formats = formats_of(choices, calibrated)
    found = [others(formats, index) for index in range(taken.config.num_hidden_layers)]
    assert found[0] != found[1], "else layers are alike, and the test says nothing"
    for index, own in enumerate(found):
        for kind, names in KINDS.items():
            expected = dict(own).get(kind, formats.layers)
            assert {formats.of(f"model.layers.{index}.{name}") for name in names} == {expected}


@pytest.mark.parametrize(
    "other", [{"weight_format": "int8"}, {"weight_format": "f16", "quantization": "rtn"}, {"kernel": "compiler"}]
)
def test_bits_are_shared_out_only_where_formats_have_neighbours(imports: Imports, other: dict[str, str]) -> None:
    job = imports.job(imports.model(**ONE), {**SHARED_OUT, **other}, context=CONTEXT, features=FEATURES)
    with pytest.raises(ChoiceRefused, match="allocation=sensitive is for kernel=own"):
        calibrate(take(job, settle(job)), job, settle(job))
