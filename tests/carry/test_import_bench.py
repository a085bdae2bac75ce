from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.frontend.files import files_of
from llmbuild.frontend.headers import read_header
from llmbuild.frontend.tensors import HEAD, misplaced, places
from llmbuild.profiler.worker import QUALITY_PROMPT
from llmbuild.runtime import reader
from llmbuild.spec.model import facts_of
from llmbuild.transform import weights as stored_weights
from tests.conftest import Project

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(SCRIPTS))

import answers  # noqa: E402
import import_memory  # noqa: E402
import imports  # noqa: E402
import kill_imports  # noqa: E402
import own_worker  # noqa: E402
import rate_distortion  # noqa: E402
import real_model  # noqa: E402
from comparison import checkpoint, conversion, gguf_file, scoring, watched  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(kind: str, **more: Any) -> dict[str, Any]:
    return {**SIZES, "model_type": kind, "tie_word_embeddings": False, **more}


@pytest.mark.parametrize("kind", checkpoint.KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_shape_has_the_tensors_that_an_import_has_places_for(kind: str, tied: bool) -> None:
    body = config(kind, tie_word_embeddings=tied, head_dim=32)
    wanted = places(facts_of(body), body["num_hidden_layers"])
    assert checkpoint.shapes(body) == {name: shape for name, shape in wanted.items() if not (tied and name == HEAD)}


def test_a_model_with_other_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="this is llama with attention_bias"):
        checkpoint.shapes(config("llama", attention_bias=True))
    with pytest.raises(ValueError, match="this is gemma"):
        checkpoint.shapes(config("gemma"))


def test_random_weights_are_written_as_a_folder_that_is_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    body = config("qwen2", architectures=["Qwen2ForCausalLM"])
    folder = checkpoint.write(body, tmp_path / "model", 3)
    (file,) = files_of(folder, random_init=False).weights
    assert misplaced(list(read_header(file).items()), facts_of(body)) == []
    tensor = safetensors.load_file(file)["model.layers.1.mlp.up_proj.weight"]
    assert str(tensor.dtype) == "torch.bfloat16"
    (values,) = checkpoint.drawn("model.layers.1.mlp.up_proj.weight", (96, 64), 3)
    assert (tensor.float().numpy() == stored_weights.from_bf16(stored_weights.to_bf16(values))).all()
    assert not (folder / "model.safetensors.partial").exists()


def test_weights_drawn_in_pieces_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = checkpoint.drawn("a.weight", (10, 8), 0)
    monkeypatch.setattr(checkpoint, "AT_ONCE", 24)
    pieces = list(checkpoint.drawn("a.weight", (10, 8), 0))
    assert [len(piece) for piece in pieces] == [3, 3, 3, 1] and (np.concatenate(pieces) == whole).all()


def test_scaled_rotations_are_those_of_the_library() -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    body = config("llama", head_dim=32, rope_scaling=LLAMA3)
    library = LlamaConfig(**{**body, "rope_parameters": {**LLAMA3, "rope_theta": body["rope_theta"]}})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](library, torch.device("cpu"))
    plain = body["rope_theta"] ** (-np.arange(0, 32, 2) / 32)
    factors = gguf_file.rope_factors(body)
    assert factors is not None and len({*factors.round(3)}) > 2
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)
    assert gguf_file.rope_factors(config("llama")) is None
    with pytest.raises(ValueError, match="of type yarn is not written"):
        gguf_file.rope_factors(config("llama", rope_scaling={"rope_type": "yarn"}))


@pytest.mark.parametrize("alike", [False, True])
def test_a_gguf_file_holds_the_tensors_with_the_first_layer_for_all_where_they_are_alike(
    tmp_path: Path, alike: bool
) -> None:
    gguf = pytest.importorskip("gguf")
    body = config("llama", rope_scaling=LLAMA3, head_dim=32)
    path = tmp_path / "model-q8_0.gguf"
    gguf_file.write(body, lambda name, shape: checkpoint.drawn(name, shape, 0), path, "q8_0", alike)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = [gguf_file.tensor_name(name) for name in checkpoint.shapes(body)]
    assert sorted(found) == sorted([*names, gguf_file.ROPE_FACTORS])
    first, second = (found[f"blk.{number}.attn_q.weight"] for number in (0, 1))
    assert bool((first.data == second.data).all()) == alike
    (drawn,) = checkpoint.drawn("model.layers.0.self_attn.q_proj.weight", (128, 64), 0)
    dense = gguf.quants.dequantize(first.data, first.tensor_type)
    head = drawn[:32].reshape(2, 16, 64)  # llama.cpp rotates neighbours: halves take turns
    np.testing.assert_allclose(dense[:32:2], head[0], atol=2e-3)
    np.testing.assert_allclose(dense[1:32:2], head[1], atol=2e-3)


GROW = """
import subprocess, sys, time
if len(sys.argv) > 1:
    held = bytearray(120_000_000); time.sleep(0.3); print("child"); sys.exit(0)
held = bytearray(60_000_000)
subprocess.run([sys.executable, "-c", open(0).read(), "child"], check=True)
"""


@pytest.mark.skipif(bool(watched.needs_linux()), reason="reads /proc")
def test_the_memory_of_a_whole_tree_is_seen() -> None:
    code = "import sys; sys.argv = ['x', *sys.argv[1:]]\n" + GROW.replace("open(0).read()", "CODE")
    code = f"CODE = {GROW!r}\n{code}"
    ran = watched.watch([sys.executable, "-c", code], stdin="")
    assert (ran.code, ran.output) == (0, "child\n"), ran.log
    assert 180e6 < ran.peak().anonymous < 300e6 and ran.peak().resident >= ran.peak().anonymous
    assert 120e6 < ran.largest_bytes < 180e6 and ran.wall_s > 0.3 and ran.cpu_s > 0
    assert ran.peak(end=ran.begin - 1).anonymous == 0


def test_a_command_that_fails_tells_its_last_line() -> None:
    ran = watched.watch([sys.executable, "-c", "raise SystemExit('no room')"])
    assert (ran.code, ran.last_line()) == (1, "no room")


def test_the_bound_of_memory_does_not_grow_with_layers() -> None:
    body = config("llama", vocab_size=50_000)
    shallow, deep = ({**body, "num_hidden_layers": count} for count in (1, 40))
    counts = {max(np.prod(shape) for shape in checkpoint.shapes(each).values()) for each in (shallow, deep)}
    assert counts == {50_000 * 64}
    assert import_memory.bound_bytes(1000, "int8") == 4000 + 1000 + import_memory.REST_BYTES
    assert import_memory.bound_bytes(1000, "f12_e4m7") == 4000 + 1500 + import_memory.REST_BYTES


def rounds() -> imports.Rounds:
    """Two rounds of made-up seconds, without any run."""
    found = object.__new__(imports.Rounds)
    found.timed, found.shape = {}, "shape"
    for number in (1, 2):
        found.at("llama.cpp", "bf16").took(number, True, 10.0, 1.0)
        found.at("llama.cpp", "f16").took(number, True, 8.0, 1.0)
        found.at("llama.cpp", "f16").took(number, False, 1.0, 1.0)
        found.at("llama.cpp", "q8_0").took(number, False, 2.0 * number, 1.0)
        for form in ("f16", "int8", "f12_e4m7"):
            found.at("llmbuild", form).took(number, True, 6.0, 1.0)
            found.at("llmbuild", form).took(number, False, 4.0, 1.0)
    found.at("baseline", "int8").took(1, True, 60.0, 1.0)
    return found


@pytest.mark.parametrize(
    ("form", "first", "further"),
    [
        ("f16", [6 / 8, 6 / 8], [4.0, 4.0]),
        ("f12_e4m7", [6 / 8, 6 / 8], [4.0, 4.0]),
        ("int8", [6 / 14, 0.5], [1.0, 2.0]),
    ],
)
def test_first_formats_meet_conversion_and_quantization_and_further_ones_the_quantization(
    form: str, first: list[float], further: list[float]
) -> None:
    row = next(r for r in rounds().rows() if (r["participant"], r["format"]) == ("llmbuild", form))
    found = {name: [ratio["least"], ratio["most"]] for name, ratio in row["ratios"].items()}
    wanted = {"first to llama.cpp": pytest.approx(first), "further to llama.cpp": pytest.approx(further)}
    more = {"first to baseline": pytest.approx([0.1, 0.1])} if form == "int8" else {}
    assert found == {**wanted, **more}


def test_the_table_of_imports_has_the_baseline_where_there_is_one() -> None:
    found = rounds()
    assert "first to baseline" in imports.text(found.rows())
    del found.timed["baseline", "int8"]
    shown = imports.text(found.rows())
    assert "baseline" not in shown and "6.00 [6.00, 6.00]" in shown
    assert json.loads(json.dumps(found.rows())) == found.rows()


@pytest.mark.slow
def test_imports_of_a_checkout_are_timed_one_after_another(tmp_path: Path) -> None:
    body = config("llama", architectures=["LlamaForCausalLM"], head_dim=16, tie_word_embeddings=True)
    weights = checkpoint.write(body, tmp_path / "tiny-0", 0)
    recipe = conversion.recipe_for(weights, 64, ["f16", "int8"], tmp_path / "tiny.yaml")
    made = conversion.imported(conversion.ROOT, recipe, ["f16", "int8"])
    assert [(each.format, each.first) for each in made] == [("f16", True), ("int8", False)]
    assert all(each.wall_s > 0 and each.cpu_s > 0 and each.anonymous_bytes > 50e6 for each in made)
    assert made[0].files["parameters"] != made[1].files["parameters"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("llmbuild")] == []
    wrong = conversion.recipe_for(weights, 64, ["no-such"], tmp_path / "wrong.yaml")
    with pytest.raises(InputError, match=r"the import ended with 2: error: .*no-such"):
        conversion.imported(conversion.ROOT, wrong, ["no-such"])


def test_variants_are_scored_as_in_their_catalog(built: Project) -> None:
    with closing(sqlite3.connect(built.catalog / "catalog.sqlite")) as connection:
        ((blob,),) = connection.execute("SELECT blob FROM reference WHERE inputs LIKE '%windows%'").fetchall()
    reference = reader.blob_path(built.catalog, blob)
    rows = [row for row in reader.variants(built.catalog, "tiny", everything=True) if row["quality_kl"] is not None]
    assert rows
    for row in rows:
        opening = {
            "artifact": str(reader.blob_path(built.catalog, row["artifact"])),
            "parameters": str(reader.blob_path(built.catalog, row["parameters"])),
            "abi": row["abi"],
            "driver": row["point"]["driver"],
            "workers": int(row["point"]["workers"]),
        }
        score = own_worker.score({**opening, "reference": str(reference), "prompt": QUALITY_PROMPT})
        assert real_model.unlike(score, row) == ""
        assert "quality_kl is" in real_model.unlike({**score, "quality_kl": score["quality_kl"] + 0.1}, row)
        told = own_worker.greedy({**opening, "prompts": [[5, 9], [7]], "stops": [], "count": 6})["answers"]
        session = own_worker.opened(opening)
        expected = [[session.prefill(prompt)] for prompt in ([5, 9], [7])]
        for prompt, tokens in zip(([5, 9], [7]), expected, strict=True):
            session.prefill(prompt)
            for past in range(len(prompt), len(prompt) + 5):
                tokens.append(session.decode(tokens[-1], past))
        assert told == expected
    with np.load(reference) as data:
        windows, length = data["tokens"].shape
    exact = scoring.exact(reference, QUALITY_PROMPT)
    assert (exact["quality_kl"], exact["quality_top1"]) == (0.0, 1.0)
    assert exact["scored"] == score["scored"] == windows * (length - QUALITY_PROMPT)


@pytest.mark.parametrize(
    ("form", "kind"),
    [("int8", "q8_0"), ("int7_g64", "q8_0"), ("f12_e4m7", "f16"), ("int4_g64", "as_is"), ("f32", "as_is")],
)
def test_on_a_real_model_each_format_meets_the_file_of_its_size(form: str, kind: str) -> None:
    assert real_model.peer_of(form, "decode_s") == ("llama.cpp", kind)


def test_greedy_answers_end_before_a_stop_and_at_their_count() -> None:
    said: list[tuple[list[int], int]] = []

    def answer(tokens: list[int], past: int) -> Any:
        """Say the number of tokens so far."""
        said.append((tokens, past))
        return np.eye(20, dtype=np.float32)[past + len(tokens)]

    assert scoring.greedy([[1, 1, 1], [1]], [6], 5, answer) == [[3, 4, 5], [1, 2, 3, 4, 5]]
    assert said[:4] == [([1, 1, 1], 0), ([3], 3), ([4], 4), ([5], 5)]


def test_along_given_answers_only_their_own_tokens_are_scored(tmp_path: Path) -> None:
    texts, asked = ([1, 2, 3, 4], [5, 6], [7, 8, 9]), (2, 2, 1)  # the second answer is empty
    told = np.random.default_rng(0).normal(size=(4, 11)).astype(np.float32)
    ends = np.cumsum([len(text) for text in texts])
    np.savez(tmp_path / "a.npz", tokens=np.concatenate(texts), ends=ends, asked=np.array(asked), logits=told)
    at = {(1, 2): 0, (3,): 1, (7,): 2, (8,): 3}

    def along(off: float) -> dict[str, Any]:
        def answer(tokens: list[int], past: int) -> Any:
            row = told[at[tuple(tokens)]] if tuple(tokens) in at else np.zeros(11, np.float32)
            return row + np.float32(off) * np.arange(11, dtype=np.float32)

        return scoring.along(tmp_path / "a.npz", answer)

    assert along(0.0) == {"answers_kl": 0.0, "answers_kl_error": 0.0, "answers_scored": 4}
    assert along(0.1)["answers_kl"] > 0.01


def test_prompts_to_calibrate_on_are_none_of_the_questions_that_are_scored() -> None:
    lines = (SCRIPTS.parents[1] / "recipes" / "prompts.txt").read_text().splitlines()
    assert (len(set(lines)), set(lines) & set(answers.QUESTIONS)) == (len(lines), set())


def test_rows_on_a_front_are_those_that_no_other_beats() -> None:
    def row(name: str, runtime: str, *figures: float | None) -> dict[str, Any]:
        return {"participant": name, "runtime": runtime, **dict(zip(rate_distortion.WEIGHED, figures, strict=True))}

    rows = [
        row("large", "llmbuild", 9, 3.0, 0.001),
        row("beaten in bytes", "llama.cpp", 10, 3.0, 0.001),
        row("small", "llmbuild", 4, 2.0, 0.5),
        row("slow and small", "llama.cpp", 3, 8.0, 0.6),
        row("beaten by another runtime", "llama.cpp", 5, 5.0, 0.5),
        row("not timed", "llmbuild", 1, None, 0.9),
    ]
    found = {
        row["participant"]: (row["front_of_all"], row["front_of_own"]) for row in rate_distortion.with_fronts(rows)
    }
    assert list(found) == [
        "not timed",
        "slow and small",
        "small",
        "beaten by another runtime",
        "large",
        "beaten in bytes",
    ]
    assert found == {
        "not timed": (False, False),
        "slow and small": (True, True),
        "small": (True, True),
        "beaten by another runtime": (False, True),
        "large": (True, True),
        "beaten in bytes": (False, True),
    }


def test_llama_cpp_knows_every_rung_of_the_ladder() -> None:
    assert set(rate_distortion.LADDER) <= set(rate_distortion.FILE_TYPES)
    assert rate_distortion.options(["--ladder", "Q6_K", "q2_k"]).ladder == ["q6_k", "q2_k"]


def test_what_a_kill_leaves_is_found(tmp_path: Path) -> None:
    place = kill_imports.Place(tmp_path)
    place.environment()
    assert (place.leftovers(), place.imports(), kill_imports.verified(place)) == ([], {}, "")
    (place.catalog / "blobs").mkdir(parents=True)
    (place.catalog / "blobs" / ".put-1").write_text("half")
    (place.temporary / "llmbuild-1").mkdir()
    assert place.leftovers() == ["catalog/blobs/.put-1", "temporary/llmbuild-1"]


def test_a_run_that_goes_on_says_what_was_there() -> None:
    assert kill_imports.RESUMED.findall("an import went on that was interrupted: 12 of 40 layers were there") == [
        ("12", "40")
    ]
    failed = SimpleNamespace(returncode=1, stdout='[{"failure": "import: no room"}]', stderr="")
    with pytest.raises(InputError, match="import: no room"):
        kill_imports.programs(failed)  # type: ignore[arg-type]


def test_a_kill_is_well_where_nothing_is_left_and_nothing_lost() -> None:
    well = kill_imports.Kill(1.0, False, "", "", 3, 1, 1, "", "", "")
    assert well.well and "1/1" in kill_imports.text([well])
    for wrong in ({"imports_kept": 0}, {"verify": "corrupt"}, {"left_after": "x"}, {"survivors": "x"}, {"result": "x"}):
        assert not kill_imports.Kill(**{**vars(well), **wrong}).well
