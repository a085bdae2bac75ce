"""Model folders as strangers keep them: what is read is what is digested and checked, and what cannot be built is
told at once, by file and key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmbuild.errors import InputError
from llmbuild.frontend.source import FoundModel, examine, find_model
from llmbuild.spec.recipe import ModelSource
from tests.conftest import llmbuild
from tests.support import folders

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"


def found(folder: Path, random_init: bool = False, context: int = 64) -> FoundModel:
    return find_model(ModelSource("huggingface", str(folder), random_init), context)


def refused(folder: Path, random_init: bool = False, context: int = 64) -> str:
    with pytest.raises(InputError) as caught:
        found(folder, random_init, context)
    return str(caught.value)


def save(folder: Path, weights: dict[str, np.ndarray]) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# --- what is read is what is digested ------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folders.write(tmp_path / "model")


@pytest.mark.parametrize("name", ["shards/a.safetensors", "b.safetensors"])
def test_a_changed_byte_in_any_shard_changes_the_digest(model: Path, name: str) -> None:
    folders.shard(model, "shards/a.safetensors", "b.safetensors")
    before = found(model).digest
    flip(model / name)
    assert found(model).digest != before


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.bin", "pytorch_model.bin", "other.safetensors", "adapter_config.json"]
)
def test_files_that_the_library_does_not_read_change_nothing(model: Path, name: str) -> None:
    before = found(model).digest
    (model / name).write_bytes(b"{}")
    assert found(model).digest == before


def test_configuration_counts_by_its_meaning(model: Path) -> None:
    before = found(model).digest
    config = json.loads((model / "config.json").read_text())
    folders.configure(model, dict(reversed(config.items())), indent=4)
    assert found(model).digest == before
    folders.configure(model, {**config, "rms_norm_eps": 1e-5})
    assert found(model).digest != before


def test_generation_settings_count_by_their_meaning(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    before = found(model).digest
    (model / "generation_config.json").write_text('{\n "eos_token_id" : 3\n}')
    assert found(model).digest == before
    (model / "generation_config.json").write_text('{"eos_token_id": 4}')
    assert found(model).digest != before


def test_random_weights_need_the_configuration_alone(model: Path) -> None:
    before = found(model, random_init=True).digest
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    assert found(model, random_init=True).digest == before


@pytest.mark.parametrize("place", ["../other/x.safetensors", "/tmp/x.safetensors", "", "a\0b.safetensors", 7])
def test_shards_outside_the_folder_are_refused(model: Path, place: Any) -> None:
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": place}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the model's folder" in refused(model)


def test_what_lies_beside_and_is_not_used_is_told(model: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "optimizer.bin"):
        (model / name).write_bytes(b"{}")
    assert found(model).notes == (
        "adapter_config.json is not used: merge the adapter into the weights to build with it",
        "weights are read from model.safetensors; not used: adapter_model.safetensors, pytorch_model.bin",
    )
    assert found(folders.write(model.parent / "plain")).notes == ()


# --- each file is checked for what it is ---------------------------------------------------------------------------


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


MISCHIEF: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a pipe, not a file"),
    "folder": (Path.mkdir, "a folder, not a file"),
    "dangling": (_dangling, "a link to nowhere, which does not exist"),
    "pointer": (lambda path: path.write_bytes(POINTER), "a Git LFS pointer, not the file itself: run `git lfs pull`"),
}


@pytest.mark.parametrize("what", MISCHIEF)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "s/a.safetensors"]
)
def test_what_is_no_file_is_told_at_once(model: Path, name: str, what: str) -> None:
    if name.startswith("s/"):
        folders.shard(model, name, "b.safetensors")
    make, reason = MISCHIEF[what]
    (model / name).unlink(missing_ok=True)
    make(model / name)
    message = refused(model)
    assert f"{model / name}: {reason}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text", ["", "[1]", r'{"a": "\ud800"}', '{"a": NaN}', "[" * 100_000, '{"a": 1' + "0" * 9999 + "}"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_what_is_no_json_object_is_told_with_its_file(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    message = refused(model)
    assert message.startswith(f"{model / name}: ")
    assert len(message) < 400


@pytest.mark.parametrize("text", ["{}", '{"model": {"type": "New"}}'])
def test_a_tokenizer_that_cannot_be_read_is_told_before_any_work(model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text)
    assert refused(model).startswith(f"{model / 'tokenizer.json'}: the tokenizer cannot be read: ")


def test_weights_that_the_configuration_names_are_the_ones_that_are_read(model: Path) -> None:
    before = found(model).digest
    (model / "model.safetensors").rename(model / "named.safetensors")
    folders.write(model, seed=1, transformers_weights="named.safetensors")
    assert examine(model, False).files.weights == (model / "named.safetensors",)
    assert found(model).digest != before  # the key itself is a value that changed
    folders.configure(model, folders.shape(transformers_weights="../named.safetensors"))
    assert "no safetensors file in this folder" in refused(model)


@pytest.mark.parametrize("size", [0, 7, 100, 5000, -1])
def test_cut_weights_are_told_with_their_file(model: Path, size: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert f"{weights}: weights are truncated or corrupt" in refused(model)


def test_a_header_that_contradicts_itself_is_refused(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [16]
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert "model.norm.weight" in refused(model)


def test_folder_of_another_form_names_what_is_there(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert "(not read: model.fp16.safetensors)" in refused(folder)


# --- every tensor has a place, every place a tensor ----------------------------------------------------------------


def _extra_layer(weights: dict[str, Any]) -> None:
    weights.update({n.replace("layers.1", "layers.2"): v.copy() for n, v in weights.items() if "layers.1" in n})


def _scale(weights: dict[str, Any]) -> None:
    weights["model.layers.0.mlp.up_proj.weight_scale"] = np.ones(1, np.float32)


def _bias(weights: dict[str, Any]) -> None:
    weights["model.layers.1.self_attn.q_proj.bias"] = np.ones(32, np.float32)


def _norm(weights: dict[str, Any]) -> None:
    weights["model.layers.1.self_attn.q_norm.weight"] = np.ones(8, np.float32)


def _codes(weights: dict[str, Any]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = np.ones((44, 32), np.int8)


def _narrow(weights: dict[str, Any]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = np.ones((43, 32), np.float32)


def _twice(weights: dict[str, Any]) -> None:
    weights["norm.weight"] = weights["model.norm.weight"].copy()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_extra_layer, "no place for: model.layers.2.input_layernorm.weight (F32 32)"),
        (_scale, "no place for: model.layers.0.mlp.up_proj.weight_scale (F32 1)"),
        (_bias, "no place for: model.layers.1.self_attn.q_proj.bias (F32 32)"),
        (_norm, "no place for: model.layers.1.self_attn.q_norm.weight (F32 8)"),
        (_codes, "no plain numbers (F64, F32, F16, BF16 are): model.layers.0.mlp.up_proj.weight is I8"),
        (_narrow, "model.layers.0.mlp.up_proj.weight is 43x32, config.json makes it 44x32"),
        (_twice, "stored twice: norm.weight (in model.safetensors and model.safetensors)"),
        (lambda weights: weights.pop("model.norm.weight"), "missing tensors: model.norm.weight"),
        (lambda weights: weights.pop(folders.EMBEDDING), f"missing tensors: {folders.EMBEDDING}"),
    ],
)
def test_tensors_that_do_not_fit_are_named(model: Path, change: Callable[[Any], object], reason: str) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save(model, weights)
    assert reason in refused(model)


def test_leftovers_of_rotary_positions_are_silent(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save(model, weights)
    assert found(model).notes == ()


def test_an_untied_head_is_needed(model: Path) -> None:
    folders.configure(model, folders.shape(tie_word_embeddings=False))
    assert "missing tensors: lm_head.weight" in refused(model)


# --- the configuration is judged by its meaning --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ("llama", {"model_type": ...}, "LlamaForCausalLM is not supported: model_type is null"),
        ("llama", {"quantization_config": {"quant_method": "new"}}, "quantized weights (new) are not supported"),
        ("llama", {"quantization_config": {}}, "quantized weights (no method is named) are not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"pad_token_id": 64}, "pad_token_id is 64"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1}, "3 does not divide hidden_size 32"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ("qwen2", {"head_dim": ..., "num_attention_heads": 3, "num_key_value_heads": 3}, "does not divide hidden_size"),
        ("qwen3", {"head_dim": None}, "head_dim is null"),
        ("llama", {"head_dim": 7}, "head_dim 7 is odd"),
        ("llama", {"hidden_size": 0}, "hidden_size is 0"),
        ("llama", {"hidden_size": "32"}, 'hidden_size is "32"'),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers is true"),
        ("llama", {"hidden_act": "prelu"}, 'hidden_act is "prelu"'),
        ("llama", {"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes"'),
        ("llama", {"eos_token_id": [2, 64]}, "eos_token_id is [2, 64]"),
        ("llama", {"torch_dtype": "float8_e4m3fn"}, 'torch_dtype is "float8_e4m3fn"'),
        ("llama", {"per_layer_config": {}}, "per_layer_config is {}"),
        ("llama", {"id2label": "x"}, 'id2label is "x"'),
        ("llama", {"label2id": {"x": "y"}}, "label2id is"),
        ("llama", {"auto_map": 3}, "auto_map is 3"),
        ("llama", {"auto_map": None}, "auto_map is null"),
        ("llama", {"num_labels": 1 << 40}, "num_labels is"),
        ("llama", {"transformers_version": 4}, "transformers_version is 4"),
        ("llama", {"problem_type": "regression"}, "problem_type is"),
        ("llama", {"chunk_size_feed_forward": None}, "chunk_size_feed_forward is null"),
        ("llama", {"rope_theta": 0}, "rope_theta is 0"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type dynamic is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing, which rope type linear needs"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 0.5}}, "beta_fast must not"),
        ("mistral", {"sliding_window": 32}, "sliding_window 32: sliding-window attention is not supported"),
        ("mistral", {"sliding_window": 32, "architectures": ["LlamaForCausalLM"]}, "sliding_window 32"),
        ("llama", {"sliding_window": 32}, "sliding_window 32"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "another class (Ministral)"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window 8"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ("llama", {"max_position_embeddings": 32}, "context 64 is longer than the 32 positions"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused_by_key(
    tmp_path: Path, kind: str, changes: dict[str, Any], reason: str
) -> None:
    folders.write(tmp_path, kind)
    folders.configure(tmp_path, folders.shape(kind, **changes))
    message = refused(tmp_path)
    assert reason in message
    assert "config.json" in message


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_a_window_that_no_position_leaves_is_none(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    assert found(folders.write(tmp_path, kind, **changes)).notes == ()


def test_quantization_is_no_matter_of_random_weights(model: Path) -> None:
    folders.configure(model, folders.shape(quantization_config={"quant_method": "fp8"}))
    assert found(model, random_init=True).notes == (
        "quantization_config (fp8) is not used: random weights are drawn in f32",
    )
    folders.configure(model, folders.shape(quantization_config="fp8"))
    assert "quantization_config: quantized weights (no method is named)" in refused(model, random_init=True)


def test_every_fault_is_told_at_once(model: Path) -> None:
    folders.configure(model, folders.shape(rms_norm_eps=0, pad_token_id=99, hidden_act="prelu"))
    (model / "generation_config.json").write_text('{"eos_token_id": 64}')
    message = refused(model)
    assert [line.split(" is ")[0] for line in message.splitlines()] == [
        f"{model}: this model cannot be taken:",
        "  config.json: rms_norm_eps",
        "  config.json: hidden_act",
        "  config.json: pad_token_id",
        "  generation_config.json: eos_token_id",
    ]


def test_what_the_library_does_not_read_is_told(tmp_path: Path) -> None:
    folder = folders.write(tmp_path, architectures=["MyForCausalLM"], rope_interleaved=True, clip_qkv=None)
    assert examine(folder, False).notes == (
        "architectures says MyForCausalLM, but model_type llama builds LlamaForCausalLM",
        "LlamaForCausalLM does not read rope_interleaved",
    )


# --- said at once --------------------------------------------------------------------------------------------------

RECIPE = """\
name: {name}
model: {{huggingface: ./{name}}}
workloads:
  - {{name: short, prompt: 8, output: 8, context: 64}}
quality: {{bounds: ['quality_kl<=0.1']}}
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three recipes whose models cannot be built, and one whose model can."""
    folder = tmp_path_factory.mktemp("recipes")
    labels = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    folders.configure(folders.write(folder / "a"), folders.shape(**labels))
    folders.write(folder / "b", max_position_embeddings=32)
    folders.configure(folders.write(folder / "c"), folders.shape(intermediate_size=45))
    folders.write(folder / "d")
    for name in "abcd":
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name))
    return folder


FAULTS = {
    "a": 'config.json: GPT2LMHeadModel is not supported: model_type is "gpt2"',
    "b": "config.json: context 64 is longer than the 32 positions that the model was made for",
    "c": "model.layers.0.mlp.gate_proj.weight is 44x32, config.json makes it 45x32",
}


def test_recipes_lists_what_cannot_be_built(recipes: Path) -> None:
    done = llmbuild("recipes", recipes, "--json")
    states = {Path(row["recipe"]).stem: row["state"] for row in json.loads(done.stdout)}
    assert states.pop("d") == "ok"
    assert {name: FAULTS[name] in state for name, state in states.items()} == dict.fromkeys("abc", True)


@pytest.mark.parametrize("name", "abc")
def test_a_dry_run_says_what_cannot_be_built_before_anything_heavy_is_loaded(recipes: Path, name: str) -> None:
    options = ["-n", recipes / f"{name}.yaml", "-C", recipes / "catalog"]
    done = llmbuild("build", *options, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 2
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    (told,) = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert FAULTS[name] in told
    assert "llmbuild.frontend.source" in loaded
    assert {"torch", "transformers", "huggingface_hub"} & loaded == set()


def test_bounds_that_cannot_be_judged_are_told_before_a_build(recipes: Path) -> None:
    done = llmbuild("build", "-n", recipes / "d.yaml", "-C", recipes / "catalog")
    assert done.returncode == 0, done.stderr
    told = "note: d: quality_kl<=0.1 will not be judged: quality is absent: the recipe names no held-out text"
    assert told in done.stderr.splitlines()
