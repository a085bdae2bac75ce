"""Write a Llama's folder as a GGUF file in f32 without a tokenizer, which llama.cpp's tools take as it is.

    python scripts/bench/folder_to_gguf.py FOLDER FILE [--blocks q8_0] [--tokenizer]

For scripts that score llama.cpp's formats on token ids, such as `rate_distortion.py --gguf FILE`; and, in Q8_0 with the
folder's tokenizer, for llama.cpp's server beside ours: `serve_http.py --gguf FILE --blocks q8_0`. Needs the package
`gguf`, which the peers' environment has. Rows of queries and keys are in the order of GGUF's rotary embedding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float32]
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name_of(name: str) -> str:
    """Return a tensor's name in GGUF.

    Raises:
        ValueError: it has none here.
    """
    base = name.removesuffix(".weight")
    if base in WHOLE:
        return f"{WHOLE[base]}.weight"
    _, _, layer, kind = base.split(".", 3)
    if kind not in OF_LAYER:
        raise ValueError(f"{name}: only Llama's tensors without biases are written")
    return f"blk.{layer}.{OF_LAYER[kind]}.weight"


def ordered(name: str, value: Array, config: dict[str, Any]) -> Array:
    """Return a tensor f32, rows of queries and keys by pairs of neighbours instead of halves of a head."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    kind = name.removesuffix(".weight").rpartition(".")[2]
    wide = value.astype(np.float32)
    if kind not in heads:
        return wide
    parts = wide.reshape(heads[kind], 2, -1, wide.shape[1])
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(wide.shape))


def tokenizer_keys(folder: Path, end: int) -> dict[str, Any]:
    """Return GGUF's keys of a tokenizer of byte-level BPE; `end` is its token that ends a text.

    Raises:
        ValueError: another kind.
    """
    found = json.loads((folder / "tokenizer.json").read_text())
    model, special = found["model"], {one["id"] for one in found["added_tokens"] if one["special"]}
    if model["type"] != "BPE" or (found["pre_tokenizer"] or {}).get("type") != "ByteLevel":
        raise ValueError(f"{folder}: only byte-level BPE is written")
    tokens = {number: text for text, number in model["vocab"].items()}
    tokens |= {one["id"]: one["content"] for one in found["added_tokens"]}
    normal, control = 1, 3
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [tokens[number] for number in sorted(tokens)],
        "token_type": [control if number in special else normal for number in sorted(tokens)],
        "merges": [one if isinstance(one, str) else " ".join(one) for one in model["merges"]],
        "eos_token_id": end,
    }


def add_tokenizer(writer: Any, keys: dict[str, Any]) -> None:
    """Write the keys of a tokenizer."""
    writer.add_tokenizer_model(keys["model"])
    writer.add_tokenizer_pre(keys["pre"])
    writer.add_token_list(keys["tokens"])
    writer.add_token_types(keys["token_type"])
    writer.add_token_merges(keys["merges"])
    writer.add_eos_token_id(keys["eos_token_id"])


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--blocks", choices=("f32", "q8_0"), default="f32", help="the format of matrices")
    parser.add_argument("--tokenizer", action="store_true", help="with the folder's tokenizer")
    asked = parser.parse_args()
    import gguf

    config = json.loads((asked.folder / "config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(asked.file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    writer.add_rope_freq_base(float(theta))
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0 if asked.blocks == "f32" else 7)
    if asked.tokenizer:
        add_tokenizer(writer, tokenizer_keys(asked.folder, int(config["eos_token_id"])))
    else:
        writer.add_tokenizer_model("none")
    form = gguf.GGMLQuantizationType[asked.blocks.upper()]
    for name, value in load_file(asked.folder / "model.safetensors").items():
        rows = ordered(name, value, config)
        if rows.ndim == 1 or asked.blocks == "f32":
            writer.add_tensor(name_of(name), rows)
        else:
            writer.add_tensor(name_of(name), gguf.quants.quantize(rows, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
