"""What is around our kernels is traced once for all formats: the module of a format is the same from any trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmbuild import digest
from llmbuild.frontend.program import import_model
from llmbuild.spec.program import CHECK_FILE, MODULE_FILE, PARAMETERS_FILE, SHELL_FILE, SIZES_FILE, ImportJob
from tests.frontend.conftest import AVX2, Imports
from tests.support import folders
from tests.support.artifact import Loaded, archived, compile_file

CONTEXT = 32
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 99, "num_attention_heads": 2, "head_dim": 32}
OWN = {"kernel": "own", "layout": "packed"}
FORMATS = (
    {"weight_format": "f16"},
    {"weight_format": "int4_g32", "head_format": "int8"},
    {"weight_format": "int8", "work_groups": "4"},
    {"weight_format": "q4_1"},
    {"weight_format": "int7_g64"},
    {"weight_format": "int6_g32", "scaling": "activation"},
    {"weight_format": "f12_e4m7"},
)

USUAL = range(4)
"""Those that an ordinary run has: floats, two formats of integers and the blocks of GGUF."""
TABLES = [
    pytest.param(
        choices,
        tied,
        id=f"{choices['weight_format']}-{'one table' if tied else 'two tables'}",
        marks=[] if tied == (number % 2 == 0) and number in USUAL else [pytest.mark.exhaustive],
    )
    for number, choices in enumerate(FORMATS)
    for tied in (True, False)
]
"""Each format with one token table or with two; the others of the two, and of the formats, are an exhaustive run's."""


def imported(folder: Path, out: Path, choices: dict[str, str], shell: Path | None = None) -> Path:
    """Return the folder of an import with our kernels."""
    text = out.with_suffix(".npy")
    np.save(text, np.random.default_rng(0).integers(0, WIDE["vocab_size"], (2, 16)))
    pairs = tuple({**OWN, **choices}.items())
    job = ImportJob(str(folder), CONTEXT, choices=pairs, features=AVX2, calibration=str(text))
    import_model(ImportJob(**{**vars(job), "shell": str(shell) if shell else ""}), out)
    return out


@pytest.fixture(scope="module")
def first(imports: Imports) -> dict[bool, Path]:
    """The imports in another format whose shells are taken, of a model with one table and of one with two."""

    def make(folder: Path, tied: bool) -> None:
        folder.mkdir()
        folders.write(folder / "model", num_hidden_layers=2, tie_word_embeddings=tied, **WIDE)
        imported(folder / "model", folder / "made", {"weight_format": "bf16"})

    return {tied: imports.make(f"shell-{tied}", lambda folder, tied=tied: make(folder, tied)) for tied in (True, False)}


@pytest.mark.parametrize(("choices", "tied"), TABLES)
def test_a_module_from_another_formats_trace_is_the_formats_own_and_computes_its_check_data(
    choices: dict[str, str], tied: bool, first: dict[bool, Path], tmp_path: Path
) -> None:
    shell, model = first[tied] / "made" / SHELL_FILE, first[tied] / "model"
    own, other = imported(model, tmp_path / "own", choices), imported(model, tmp_path / "other", choices, shell)
    files = (MODULE_FILE, SIZES_FILE, PARAMETERS_FILE)
    assert [digest.of_file(other / name) for name in files] == [digest.of_file(own / name) for name in files]
    assert digest.of_file(own / MODULE_FILE) != digest.of_file(first[tied] / "made" / MODULE_FILE)
    assert ((own / SHELL_FILE).is_file(), (other / SHELL_FILE).is_file()) == (True, False)
    sizes = json.loads((other / SIZES_FILE).read_text())
    assert sizes == {name: len(data) for name, data in archived(other / PARAMETERS_FILE).items()}
    if not tied:
        return
    loaded = Loaded(other, compile_file(other / MODULE_FILE, tmp_path / "a.vmfb"))
    with np.load(other / CHECK_FILE) as check:
        found = loaded.forced(check["prompt"][0], check["forced"][0])
        off = np.sqrt(np.square(found - check["logits"][:, 0]).mean() / np.square(check["logits"]).mean())
    assert off < 0.02, "a sum in another order moves a rounded input by a code; another table moves all"


def test_a_shell_does_not_depend_on_the_values_of_weights(first: dict[bool, Path], tmp_path: Path) -> None:
    twin = folders.write(tmp_path / "twin", seed=1, num_hidden_layers=2, tie_word_embeddings=True, **WIDE)
    made = imported(twin, tmp_path / "made", {"weight_format": "bf16"})
    one = first[True] / "made"
    assert (made / SHELL_FILE).read_bytes() == (one / SHELL_FILE).read_bytes()
    assert digest.of_file(made / PARAMETERS_FILE) != digest.of_file(one / PARAMETERS_FILE)
