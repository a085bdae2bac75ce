"""What rounding each matrix does, by one pass back, held against rounding each and looking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmbuild.frontend.calibration import Calibration
from llmbuild.frontend.layerwise import Layers, head_parts
from llmbuild.frontend.own import KINDS
from llmbuild.frontend.program import settle, take
from llmbuild.frontend.sensitivity import harms
from llmbuild.spec.formats import INTEGERS
from llmbuild.spec.program import ImportJob
from llmbuild.transform.quantized import dequantize, quantize

PYSTDLIB = Path(__file__).parents[2] / "recipes" / "pystdlib"
COARSE, FINE = INTEGERS["int3_g32"], INTEGERS["int7_g32"]


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    job = ImportJob(str(PYSTDLIB), 128)
    taken = take(job, settle(job))
    tokens = np.random.default_rng(0).integers(0, 400, (4, 96))
    return Calibration(taken.config, taken.weights, tokens)


def logits(calibration: Calibration, rounded: tuple[int, str] | None = None) -> torch.Tensor:
    """Return log-probabilities f32[n,V], with one kind of matrix of one layer rounded."""
    layers: Layers = calibration._layers
    states = calibration._begin()
    for index in range(calibration.config.num_hidden_layers):
        layer = calibration._load(index)
        for name in KINDS[rounded[1]] if rounded and rounded[0] == index else ():
            weight = layer.get_submodule(name).weight
            weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), COARSE))))
        states = layers.run(states)
    rows = layers.normalized(states, calibration.model.whole("model.norm.weight")).flatten(0, 1)
    return torch.log_softmax(torch.cat([rows @ part.T for _, part in head_parts(calibration.model)], -1), -1)


def test_harms_are_near_the_divergence_that_rounding_each_alone_makes(calibration: Calibration) -> None:
    found = harms(calibration._layers, calibration.model, calibration.tokens, COARSE, KINDS)
    with torch.no_grad():
        exact = logits(calibration)
        seen = {place: float((exact.exp() * (exact - logits(calibration, place))).sum(-1).mean()) for place in found}
    ratios = np.array([found[place].harm / seen[place] for place in found])
    assert list(found) == [(i, kind) for i in range(calibration.config.num_hidden_layers) for kind in KINDS]
    assert ratios.min() > 0.2 and ratios.max() < 5
    order = [np.argsort(np.argsort(list(values))) for values in ([p.harm for p in found.values()], seen.values())]
    assert np.corrcoef(*order)[0, 1] > 0.85


def test_finer_steps_do_little_harm_and_tokens_are_drawn_alike_each_time(calibration: Calibration) -> None:
    asked = (calibration._layers, calibration.model, calibration.tokens[:1], FINE, {"out": KINDS["out"]})
    found = harms(*asked)
    assert all(0 < part.harm < 0.01 for part in found.values())
    assert harms(*asked) == found, "drawn tokens are the same each time"
