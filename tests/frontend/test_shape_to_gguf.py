"""A shape written as a GGUF file with another file's tokenizer: its keys, its formats, and that llmbuild takes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.frontend import test_gguf_tokenizer as other
from tests.support import gguf_files

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import shape_to_gguf

KEYS = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"<{i}>" for i in range(64)],
    "tokenizer.ggml.scores": [float(-i) for i in range(64)],
    "tokenizer.ggml.token_type": [1] * 64,
    "tokenizer.ggml.add_bos_token": False,
}


def shape(**changes: Any) -> dict[str, Any]:
    fixed = {"tie_word_embeddings": True, "vocab_size": 64, "rope_theta": 10000.0, "num_hidden_layers": 2}
    return gguf_files.configuration(**{**fixed, **changes})


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return other.write(tmp_path, KEYS)


def test_the_tokenizer_of_the_other_file_is_kept_with_its_types(tokenizer: Path, tmp_path: Path) -> None:
    shape_to_gguf.write(shape(), tokenizer, tmp_path / "made.gguf", "q4_1")
    found = gguf.GGUFReader(str(tmp_path / "made.gguf")).fields
    assert {name: found[name].contents() for name in KEYS} == {
        **KEYS,
        "tokenizer.ggml.scores": pytest.approx(KEYS["tokenizer.ggml.scores"]),
    }
    assert found["llama.block_count"].contents() == 2


@pytest.mark.parametrize("blocks", shape_to_gguf.BLOCKS)
def test_matrices_have_the_blocks_and_the_embedding_has_eight_bits(
    blocks: str, tokenizer: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made.gguf"
    shape_to_gguf.write(shape(), tokenizer, made, blocks)
    types = {one.name: one.tensor_type.name.lower() for one in gguf.GGUFReader(str(made)).tensors}
    assert types["token_embd.weight"] == "q8_0"
    assert types["output_norm.weight"] == "f32"
    assert {types[f"blk.{i}.ffn_down.weight"] for i in range(2)} == {blocks}


def test_a_tokenizer_of_another_size_is_refused_and_nothing_is_written(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 64 tokens, the shape has 65"):
        shape_to_gguf.write({**shape(), "vocab_size": 65}, tokenizer, tmp_path / "made.gguf", "q4_1")
    assert not list(tmp_path.glob("made*"))
