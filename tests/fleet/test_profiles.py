"""Profiles: fits on published rows with their error and basis, and who stands for whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.fleet.profiles.gather import profiles_of
from llmbuild.fleet.profiles.published import _rows, least_squares, published
from llmbuild.spec.fleet import Line, Profile
from tests.support.fleets import fleet, node, profile, service


def one(device: str) -> Profile:
    return next(each for each in published() if each.device == device)


@pytest.mark.parametrize(("device", "error"), [("H100-SXM-80GB", 0.04), ("A100-SXM-40GB", 0.15), ("L40S-48GB", 0.05)])
def test_a_fit_is_as_near_to_its_rows_as_it_says(device: str, error: float) -> None:
    fitted = one(device)
    worst = 0.0
    for row in _rows():
        if row.device == device and row.use == "step":
            step = fitted.step
            made = row.output * (step.rows_s(row.rows) + step.context_s * row.rows * (row.prompt + row.output / 2))
            made += step.prompt_s * row.rows * row.prompt
            worst = max(worst, abs(made / row.seconds - 1))
    assert worst == pytest.approx(fitted.error)
    assert worst <= error


def test_every_published_row_names_its_source() -> None:
    assert [row for row in _rows() if "@" not in row.source] == []


def test_bases_are_kept_apart() -> None:
    h100, l40s = one("H100-SXM-80GB"), one("L40S-48GB")
    assert (h100.decode_basis, h100.prompt_basis, h100.power_basis) == ("published", "estimated", "published")
    assert h100.told == "decode published, prompt estimated, power published"
    assert (l40s.basis, l40s.told) == ("estimated", "estimated")


def test_a_fit_without_noise_finds_the_numbers_and_no_negative_ones() -> None:
    rng = np.random.default_rng(0)
    lines = rng.random((12, 3))
    assert least_squares(lines, lines @ np.array([2.0, 0.0, 0.5])) == pytest.approx([2.0, 0.0, 0.5])
    assert least_squares(lines, lines @ np.array([2.0, -1.0, 0.5])).min() >= 0


def test_a_line_goes_through_its_places_and_on() -> None:
    line = Line((1.0, 3.0, 5.0), (10.0, 20.0, 40.0))
    assert [line(x) for x in (0, 1, 2, 3, 4, 5, 6)] == [5, 10, 15, 20, 30, 40, 50]


def test_a_given_profile_stands_for_the_published_one(tmp_path: Path) -> None:
    given = replace(profile("H100-SXM-80GB", "llama-3-8b"), variant="fp16")
    made = fleet(service("s", 1.0, model="llama-3-8b"), nodes=(replace(node(), device="H100-SXM-80GB"),))
    assert [p.source for p in profiles_of(replace(made, profiles=(given,)), tmp_path)] == ["made up"]


def test_a_model_without_a_profile_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no profile of model m on any of fast.*llama-3-8b on H100-SXM-80GB"):
        profiles_of(fleet(), tmp_path)
