"""Several sequences answered together: what one artifact says of each is what it would say of it alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.frontend.reference import reference_greedy
from llmbuild.profiler.worker import Worker
from llmbuild.runtime.sampling import Sampling
from llmbuild.runtime.session import Session, Settings
from llmbuild.runtime.together import answer
from llmbuild.spec.program import abi_from
from tests.conftest import Project, llmbuild, shared
from tests.frontend.conftest import BIASED, Imported, Imports

CONTEXT, BATCH = 64, 3
PROMPTS = [[7, 300, 12, 99, 5, 41], [11, 12], [250, 3, 77, 8], [1], [9, 9, 9, 9, 9, 9, 9]]


@pytest.fixture(scope="module")
def model(imports: Imports) -> Path:
    return imports.model(**BIASED)


@pytest.fixture(scope="module")
def made(imports: Imports, model: Path) -> Callable[..., Imported]:
    return lambda **choices: imports(model, choices, context=CONTEXT, batch=BATCH)


def opened(made: Imported, driver: str = "local-task") -> Session:
    abi = abi_from(json.loads((made.folder / "abi.json").read_text()))
    return Session(made.compiled() / "m.vmfb", made.folder / "parameters.irpa", abi, Settings(driver, 2))


@pytest.mark.parametrize(
    "choices",
    [
        {},
        pytest.param(
            {"weight_format": "int8_g32", "head_format": "int4_g32", "layout": "packed", "kv_dtype": "int8"},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=lambda choices: "-".join(choices.values()) or "default",
)
def test_a_batch_agrees_with_its_check_data(made: Callable[..., Imported], choices: dict[str, str]) -> None:
    of, worker = made(**choices), Worker()
    worker._session, folder = opened(of), of.folder
    with np.load(folder / "check.npz") as check:
        assert check["logits"].shape == (1 + check["forced"].shape[1], BATCH, 320)
        assert len(set(check["start"].tolist())) == BATCH, "each sequence goes on from a position of its own"
    found = worker.check({"data": str(folder / "check.npz")})
    assert found["error"] < max(1e-5, 10 * found["noise"])
    assert found["top1"] == 1.0


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "memory of its own"])
def test_prompts_of_any_length_and_number_are_continued_as_the_library_would(
    made: Callable[..., Imported], model: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    monkeypatch.setattr("llmbuild.runtime.session.shares_memory", lambda driver: shared)
    expected = [reference_greedy(str(model), False, 0, np.array(p), 8).tolist() for p in PROMPTS]
    assert answer(opened(made()), PROMPTS, 8, Sampling()) == expected


def test_one_prompt_goes_through_a_batch_as_well(made: Callable[..., Imported], model: Path) -> None:
    expected = reference_greedy(str(model), False, 0, np.array(PROMPTS[0]), 4).tolist()
    session = opened(made())
    tokens = [session.prefill(PROMPTS[0])]
    for position in range(len(PROMPTS[0]), len(PROMPTS[0]) + 3):
        tokens.append(session.decode(tokens[-1], position))
    assert tokens == expected


def test_a_sequence_that_ends_leaves_the_others_as_they_were(made: Callable[..., Imported]) -> None:
    session = opened(made())
    long = [5] * (CONTEXT - 2)
    whole = answer(session, PROMPTS[:1], 8, Sampling())[0]
    assert [len(found) for found in answer(session, [PROMPTS[0], long], 8, Sampling())] == [8, 3]
    assert answer(session, [long, PROMPTS[0]], 8, Sampling())[1] == whole
    assert answer(session, PROMPTS, 0, Sampling()) == [[]] * len(PROMPTS)


def test_drawn_text_depends_on_the_seed_alone(made: Callable[..., Imported]) -> None:
    session, hot = opened(made()), Sampling(temperature=2.0, seed=5)
    first, again = (answer(session, [PROMPTS[0]] * 3, 8, hot) for _ in range(2))
    assert first == again
    assert len({tuple(one) for one in first}) == 3, "each sequence draws for itself"


def test_what_does_not_fit_a_batch_is_told(made: Callable[..., Imported]) -> None:
    session = opened(made())
    with pytest.raises(InputError, match=r"prompts must be i64\[3,T\]"):
        session.prefill_batch(np.zeros((2, 4), np.int64))
    with pytest.raises(InputError, match=r"tokens must be i64\[3\]"):
        session.decode_batch(np.zeros(2, np.int64), 4)
    with pytest.raises(InputError, match="outside a context of 64"):
        session.decode_batch(np.zeros(3, np.int64), np.array([1, 2, CONTEXT]))
    with pytest.raises(InputError, match="a prompt is empty"):
        answer(session, [[1], []], 4, Sampling())
    with pytest.raises(InputError, match="one sequence at a time, the batch is 3"):
        made(weight_format="int8", layout="packed", kernel="own")


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory, built: Project) -> Project:
    """The built project with a recipe for batches besides, built too: this machine's limits are known by then."""

    def make(folder: Path) -> None:
        shutil.copytree(built.folder, folder)
        text = built.recipe.read_text().replace("name: tiny", "name: batch").replace("trials: 3", "trials: 1")
        (folder / "batch.yaml").write_text(text.replace("context: 32}", "context: 32, batch: 3}"))
        done = llmbuild("build", folder / "batch.yaml", "-C", folder / "catalog")
        assert done.returncode == 0, done.stderr

    folder = shared(tmp_path_factory, "batched", make)
    return Project(folder, folder / "batch.yaml", folder / "catalog", folder / "model")


@pytest.mark.exhaustive
def test_rates_of_a_built_batch_count_the_tokens_of_all(batched: Project) -> None:
    done = llmbuild("query", "-m", "batch", "--json", "--all", "-C", batched.catalog)
    (row,) = json.loads(done.stdout)
    whole = row["ttft_s"] + 7 * row["tpot_s"]
    assert row["output_tokens_per_s"] == pytest.approx(3 * 8 / whole, rel=0.25)
    assert row["quality_kl"] < 1e-6


def test_a_built_batch_is_loaded_and_answers_texts(batched: Project) -> None:
    from llmbuild.runtime import load

    model = load(batched.catalog, "batch")
    texts = ["def push(", "self.items", "def push(self, item):"]
    assert model.generate_batch(texts, 6) == ["".join(model.generate(text, 6)) for text in texts]


def test_a_change_of_batch_makes_all_stale_by_name(batched: Project, tmp_path: Path) -> None:
    other = tmp_path / "wider.yaml"
    text = batched.recipe.read_text().replace("batch: 3", "batch: 2")
    other.write_text(text.replace("./", f"{batched.folder}/"))
    done = llmbuild("build", other, "-n", "--json", "-C", batched.catalog)
    reasons = {row["step"]: row["reason"] for row in json.loads(done.stdout)}
    assert "batch" in reasons["import"], reasons
