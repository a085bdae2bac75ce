"""Run one peer runtime: JSON requests on stdin, one JSON answer a line on stdout. Lives in the peers' environment.

write    {source, random_init, seed, folder, checkpoint, gguf} -> the model as a Hugging Face folder and as GGUF files
quantize {source, target, format, threads, importance}       -> seconds, cpu_s, bytes, peak_memory_bytes
export   {folder, format}                                    -> the model as OpenVINO IR with compressed weights
score    {folder, format, threads, positions, reference, prompt} -> KL, top-1 and perplexity, of llama.cpp alone
greedy   {folder, format, threads, positions, prompts, stops, count} -> answers in tokens, of llama.cpp alone
along    {folder, format, threads, positions, reference}     -> KL along given answers, of llama.cpp alone
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
from time import perf_counter, process_time
from typing import Any

Step = Callable[[list[int], int], None]
Request = dict[str, Any]
CHUNK = 512
"""Tokens of one untimed call while a long context is filled."""

FILE_TYPES = {
    "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9,
    "q2_k": 10, "q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
"""llama.cpp's numbers of the formats that a file mostly has."""


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


def _llama_context(request: Request) -> Callable[[], Any]:
    """Return what opens a GGUF file: everything is as the library sets it, so weights are repacked where it does so."""
    import llama_cpp as api

    path = str(Path(request["folder"]) / gguf_name(request["format"]))
    api.llama_backend_init()

    def load() -> Any:
        model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx = request["positions"]
        settings.n_threads = settings.n_threads_batch = request["threads"]
        context = api.llama_init_from_model(model, settings) if model else None
        if not context:
            raise RuntimeError(f"llama.cpp does not open {path}")
        return context

    return load


def _llama_step(context: Any) -> Step:
    import llama_cpp as api

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


def llama_cpp(request: Request) -> tuple[Callable[[], Step], str]:
    """A GGUF file, batch 1."""
    load = _llama_context(request)
    return lambda: _llama_step(load()), version("llama-cpp-python")


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
    """Write what is not there yet: the model's Hugging Face folder, if asked for, and GGUF files; each whole or not.

    Random weights are drawn tensor by tensor. In GGUF, all layers have those of the first: see `gguf_file.write`.
    """
    folder, random_init = Path(request["folder"]), request["random_init"]
    folder.mkdir(parents=True, exist_ok=True)
    written = (folder / "model.safetensors").is_file()
    missing = [kind for kind in request["gguf"] if not (folder / gguf_name(kind)).is_file()]
    if not missing and (written or not request["checkpoint"]):
        return {"wrote": []}
    from comparison import checkpoint, gguf_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if not random_init and not written:
        model = AutoModelForCausalLM.from_pretrained(request["source"])
        model.float().save_pretrained(folder, max_shard_size="1TB")
    config = AutoConfig.from_pretrained(request["source"] if random_init else folder).to_dict()
    if random_init and request["checkpoint"]:
        checkpoint.write(config, folder, request["seed"], "F32")
    values = gguf_file.stored(folder / "model.safetensors") if not random_init else _drawn(request["seed"])
    for kind in missing:
        gguf_file.write(config, values, folder / gguf_name(kind), kind, alike=random_init)
    return {"wrote": [str(folder / gguf_name(kind)) for kind in missing]}


def _drawn(seed: int) -> Any:
    from comparison import checkpoint

    return lambda name, shape: checkpoint.drawn(name, shape, seed)


def quantize(request: Request) -> Request:
    """Make a GGUF file of {source} in {format} by llama.cpp, with its own settings; one that has it is made anew.

    {importance}, where it is given, is an `.npz` with f32[K] for each matrix by its name: what its inputs count.

    Raises:
        RuntimeError: it cannot.
    """
    import ctypes

    import llama_cpp as api

    wanted = api.llama_model_quantize_default_params()
    wanted.ftype, wanted.allow_requantize = FILE_TYPES[request["format"]], True
    wanted.nthread = request["threads"]
    given = _importance(request["importance"]) if request.get("importance") else None
    if given is not None:
        wanted.imatrix = given
    begin, busy = perf_counter(), process_time()
    code = api.llama_model_quantize(request["source"].encode(), request["target"].encode(), ctypes.byref(wanted))
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")
    seconds, cpu = perf_counter() - begin, process_time() - busy
    size = Path(request["target"]).stat().st_size
    return {"seconds": seconds, "cpu_s": cpu, "bytes": size, "peak_memory_bytes": peak_memory_bytes()}


def _importance(path: str) -> Any:
    """Return an importance matrix as llama.cpp takes it: it ends with an entry without a name."""
    import ctypes

    import llama_cpp as api
    import numpy as np

    with np.load(path) as data:
        found = {name: np.ascontiguousarray(data[name], np.float32) for name in data.files}
    entries = (api.llama_model_imatrix_data * (len(found) + 1))()
    real = ctypes.POINTER(ctypes.c_float)
    for entry, (name, values) in zip(entries, found.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data_as(real), values.size
    entries.kept = found  # what the pointers point to
    return entries


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


def _answering(request: Request) -> Any:
    """Return what gives llama.cpp's logits of a GGUF file."""
    import llama_cpp as api
    import numpy as np

    context = _llama_context(request)()
    step = _llama_step(context)
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))

    def answer(tokens: list[int], past: int) -> Any:
        step(tokens, past)
        return np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (size,)).copy()

    return answer


def score(request: Request) -> Request:
    """Score a GGUF file on {reference} with a {prompt}."""
    from comparison import scoring

    return scoring.score(Path(request["reference"]), request["prompt"], _answering(request))


def greedy(request: Request) -> Request:
    """Answer {prompts} with up to {count} tokens each, until one of {stops}."""
    from comparison import scoring

    return {"answers": scoring.greedy(request["prompts"], request["stops"], request["count"], _answering(request))}


def along(request: Request) -> Request:
    """Score llama.cpp along the answers of {reference}."""
    from comparison import scoring

    return scoring.along(Path(request["reference"]), _answering(request))


def main() -> None:
    """Serve one peer."""
    runner = Runner(lambda request: PEERS[request["peer"]](request))
    serve(
        {
            "write": write,
            "export": export,
            "quantize": quantize,
            "score": score,
            "greedy": greedy,
            "along": along,
            "open": runner.open,
            "round": runner.round,
        }
    )


if __name__ == "__main__":
    main()
