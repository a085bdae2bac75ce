"""Run one peer runtime: JSON requests on stdin, one JSON answer a line on stdout. Lives in the peers' environment.

write    {source, random_init, seed, folder, gguf}           -> the model as a Hugging Face folder and as GGUF files
export   {folder, format}                                    -> the model as OpenVINO IR with compressed weights
open     {peer, folder, format, threads, positions, first}   -> load_s, first_token_s, peak_memory_bytes, version
round    {prompt, forced, fill}                              -> prefill_s, decode_s of each token, peak_memory_bytes

`round` and the loop around it are the same for every runtime, llmbuild's own worker included: `step(tokens, past)` runs
tokens from position `past` on and returns when the logits of the last one are there. Seconds are of a monotonic clock.
Nothing of llmbuild is imported here.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

Step = Callable[[list[int], int], None]
Request = dict[str, Any]
CHUNK = 512
"""Tokens of one untimed call while a long context is filled."""


class Runner:
    """What is open in this process: one way to run tokens."""

    def __init__(self, loader: Callable[[Request], tuple[Callable[[], Step], str]]) -> None:
        self._loader = loader
        self._step: Step | None = None

    def open(self, request: Request) -> Request:
        """Load the model and answer a short prompt; the seconds leave out the start of Python and its imports."""
        load, told_version = self._loader(request)
        begin = perf_counter()
        self._step = load()
        loaded = perf_counter()
        self._step(request["first"], 0)
        return {
            "load_s": loaded - begin,
            "first_token_s": perf_counter() - begin,
            "peak_memory_bytes": peak_memory_bytes(),
            "version": told_version,
        }

    def round(self, request: Request) -> Request:
        """Time a prompt, then single tokens behind `fill` more of them.

        An untimed prompt comes first: others have had the caches since this process last ran.
        """
        if self._step is None:
            raise RuntimeError("nothing is open")
        step, prompt, fill = self._step, request["prompt"], request["fill"]
        step(prompt, 0)
        begin = perf_counter()
        step(prompt, 0)
        prefill_s = perf_counter() - begin
        past = len(prompt)
        for start in range(0, len(fill), CHUNK):
            step(fill[start : start + CHUNK], past)
            past += len(fill[start : start + CHUNK])
        decode_s = []
        for token in request["forced"]:
            begin = perf_counter()
            step([token], past)
            decode_s.append(perf_counter() - begin)
            past += 1
        return {"prefill_s": prefill_s, "decode_s": decode_s, "peak_memory_bytes": peak_memory_bytes()}


def peak_memory_bytes() -> int:
    """Return the peak resident set of this process."""
    try:
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        match = None
    if match:
        return int(match[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def serve(verbs: dict[str, Callable[[Request], Request]]) -> None:
    """Answer requests until stdin ends; what libraries print on stdout goes to stderr, answers alone to stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = verbs[request.pop("verb")](request)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is told and becomes its row
            text = next((x.strip() for x in str(error).splitlines() if x.strip()), "")
            answer = {"refused": f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)


def llama_cpp(request: Request) -> tuple[Callable[[], Step], str]:
    """A GGUF file, batch 1, everything else as the library sets it (weights are repacked, flash attention is auto)."""
    import llama_cpp as api

    path = str(Path(request["folder"]) / gguf_name(request["format"]))
    api.llama_backend_init()

    def load() -> Step:
        model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx = request["positions"]
        settings.n_threads = settings.n_threads_batch = request["threads"]
        context = api.llama_init_from_model(model, settings) if model else None
        if not context:
            raise RuntimeError(f"llama.cpp does not open {path}")
        memory = api.llama_get_memory(context)

        def step(tokens: list[int], past: int) -> None:
            if past == 0:
                api.llama_memory_clear(memory, False)
            ids = (api.llama_token * len(tokens))(*tokens)  # kept alive: the batch only points at it
            code = api.llama_decode(context, api.llama_batch_get_one(ids, len(tokens)))
            if code:
                raise RuntimeError(f"llama_decode returned {code}")
            api.llama_synchronize(context)

        return step

    return load, version("llama-cpp-python")


def openvino(request: Request) -> tuple[Callable[[], Step], str]:
    """OpenVINO IR with the cache as state, compiled for latency."""
    import numpy as np
    import openvino as ov

    path = Path(request["folder"]) / ir_name(request["format"])
    settings = {"INFERENCE_NUM_THREADS": request["threads"], "PERFORMANCE_HINT": "LATENCY"}

    def load() -> Step:
        calls = ov.Core().compile_model(str(path), "CPU", settings).create_infer_request()

        def step(tokens: list[int], past: int) -> None:
            if past == 0:
                calls.reset_state()
            until = past + len(tokens)
            inputs = {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, until), np.int64),
                "position_ids": np.arange(past, until, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            calls.infer(inputs, share_inputs=True, share_outputs=True)

        return step

    return load, version("openvino")


def torch_eager(request: Request) -> tuple[Callable[[], Step], str]:
    """PyTorch without compilation, on the transformers library's own model with a preallocated cache."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    torch.set_num_threads(request["threads"])

    def load() -> Step:
        model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=getattr(torch, request["format"])).eval()
        cache = StaticCache(config=model.config, max_cache_len=request["positions"])

        @torch.inference_mode()
        def step(tokens: list[int], past: int) -> None:
            if past == 0:
                cache.reset()
            model(
                input_ids=torch.tensor([tokens]),
                past_key_values=cache,
                cache_position=torch.arange(past, past + len(tokens)),
                logits_to_keep=1,
            )

        return step

    return load, version("torch")


PEERS = {"llama.cpp": llama_cpp, "openvino": openvino, "torch": torch_eager}


def gguf_name(kind: str) -> str:
    """Return the file of a GGUF format."""
    return f"model-{kind}.gguf"


def ir_name(kind: str) -> str:
    """Return the file of OpenVINO IR with weights of `kind`."""
    return f"openvino-{kind}/openvino_model.xml"


def write(request: Request) -> Request:
    """Write the model's Hugging Face folder and the GGUF files that are not there yet; each appears whole or not."""
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    written = (folder / "model.safetensors").is_file()
    missing = [kind for kind in request["gguf"] if not (folder / gguf_name(kind)).is_file()]
    if written and not missing:
        return {"wrote": []}
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if request["random_init"] and not written:
        torch.manual_seed(request["seed"])
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(request["source"]))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder if written else request["source"])
    model = model.float().eval()
    if not written:
        model.save_pretrained(folder, max_shard_size="1TB")
    for kind in missing:
        write_gguf(model, folder / gguf_name(kind), kind)
    return {"wrote": [str(folder / gguf_name(kind)) for kind in missing]}


def write_gguf(model: Any, path: Path, kind: str) -> None:
    """Write a Llama's weights as GGUF, all matrices in `kind` and the norms in f32, without a tokenizer.

    Raises:
        ValueError: not a plain Llama.
    """
    import gguf
    import numpy as np

    config = model.config
    if config.model_type not in ("llama", "mistral") or config.attention_bias or config.rope_scaling:
        raise ValueError(f"GGUF is written for plain Llama models only, this is {config.model_type}")
    kinds = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
    stored = gguf.GGMLQuantizationType[kinds[kind]]
    partial = path.with_suffix(".partial")
    out = gguf.GGUFWriter(str(partial), "llama")
    describe(out, config)
    for name, tensor in model.state_dict().items():
        target = gguf_tensor(name, config.tie_word_embeddings)
        if target is None:
            continue
        values = tensor.numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(target.split(".")[-2])
        if heads:
            values = pair_rotations(values, heads)
        if values.ndim == 1:
            out.add_tensor(target, np.ascontiguousarray(values, np.float32))
        elif kind == "f16":
            out.add_tensor(target, values.astype(np.float16))
        else:
            out.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    partial.rename(path)


def describe(out: Any, config: Any) -> None:
    """Write the shape of a Llama into GGUF's keys."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(head)
    out.add_value_length(head)
    out.add_rope_dimension_count(head)
    out.add_rope_freq_base(config.rope_theta)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("no_vocab")


def gguf_tensor(name: str, tied: bool) -> str | None:
    """Return GGUF's name of a weight; None for one that is not stored."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not tied:
        whole["lm_head.weight"] = "output.weight"
    if name in whole:
        return whole[name]
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.weight", name)
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    return f"blk.{layer[1]}.{parts[layer[2]]}.weight" if layer else None


def pair_rotations(values: Any, heads: int) -> Any:
    """Return rows in the order of llama.cpp, which rotates neighbours; the transformers library rotates two halves."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def export(request: Request) -> Request:
    """Write OpenVINO IR whose logits are of the last token alone, as its own generation library makes them."""
    folder = Path(request["folder"])
    path = folder / ir_name(request["format"])
    if path.is_file() and path.with_suffix(".bin").is_file():
        return {"wrote": []}
    import openvino as ov
    from openvino import opset13
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    group = {"group_size": 64, "ratio": 1.0}
    compressed = {"int8": {"bits": 8}, "int4": {"bits": 4, **group}}[request["format"]]
    made = OVModelForCausalLM.from_pretrained(
        folder, export=True, quantization_config=OVWeightQuantizationConfig(**compressed), compile=False
    ).model
    head = made.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    last = opset13.slice(head.input_value(0), [-1], [1 << 31], [1], [1])
    head.input(0).replace_source_output(last.output(0))
    made.validate_nodes_and_infer_types()
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name("partial.xml")
    ov.save_model(made, str(partial), compress_to_fp16=False)
    partial.with_suffix(".bin").rename(path.with_suffix(".bin"))
    partial.rename(path)
    return {"wrote": [str(path)]}


def main() -> None:
    """Serve one peer."""
    runner = Runner(lambda request: PEERS[request["peer"]](request))
    serve({"write": write, "export": export, "open": runner.open, "round": runner.round})


if __name__ == "__main__":
    main()
