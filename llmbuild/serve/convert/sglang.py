"""The flags of SGLang's server."""

from __future__ import annotations

from collections.abc import Mapping

from llmbuild.serve.convert import rules as r
from llmbuild.serve.convert.rules import Flag

_DEVICE, _ENGINE = r.one("device"), r.one("engine")
_BACKEND = r.moot("kernels are those of the variant")

FLAGS: Mapping[str, Flag] = {
    "model-path": Flag(r.model),
    "served-model-name": Flag(r.name),
    "context-length": Flag(r.context),
    "dtype": Flag(r.DTYPE),
    "quantization": Flag(r.QUANTIZATION),
    "kv-cache-dtype": Flag(r.KV_DTYPE),
    "load-format": Flag(r.load_format),
    "host": Flag(r.serve("--host")),
    "port": Flag(r.serve("--port")),
    "api-key": Flag(r.keys),
    "admin-api-key": Flag(r.refuse("there are no paths for administrators")),
    "max-running-requests": Flag(r.count("--max-sequences", 1, 1024)),
    "max-queued-requests": Flag(r.count("--max-queue", 1, 1 << 16)),
    "mem-fraction-static": Flag(r.share),
    "chunked-prefill-size": Flag(r.chunked),
    "max-prefill-tokens": Flag(r.refuse("how many tokens a step has is the scheduler's to say")),
    "max-total-tokens": Flag(r.refuse("llmbuild serve --memory bounds the blocks")),
    "schedule-policy": Flag(
        r.only(("fcfs",), "requests of equal priority are taken in their order", "there is no such policy")
    ),
    "schedule-conservativeness": Flag(
        r.moot("all that a request may take is reserved, unless llmbuild serve has --admission expected")
    ),
    "enable-priority-scheduling": Flag(r.moot("priorities hold under every scheduler"), 0),
    "enable-mixed-chunk": Flag(r.moot("prompts and decodes share a step"), 0),
    "page-size": Flag(r.moot("blocks have 32 positions")),
    "disable-radix-cache": Flag(r.refuse("prompts that begin alike always share blocks"), 0),
    "random-seed": Flag(r.moot("a request has its own seed")),
    "tokenizer-path": Flag(r.refuse("the tokenizer is the model's own: put it into its folder")),
    "tokenizer-mode": Flag(r.only(("auto", "fast"), "the tokenizer is the fast one", "there is the fast one alone")),
    "skip-tokenizer-init": Flag(r.refuse("the API needs the tokenizer"), 0),
    "revision": Flag(r.refuse("name a folder with the files of that revision")),
    "trust-remote-code": Flag(r.NO_CODE, 0),
    "download-dir": Flag(r.refuse("set HF_HOME for `llmbuild build`")),
    "json-model-override-args": Flag(r.refuse("change config.json in the model's folder")),
    "is-embedding": Flag(r.refuse("models generate text alone"), 0),
    "enable-multimodal": Flag(r.NO_MEDIA, 0),
    "chat-template": Flag(r.refuse("put it into the model's folder as chat_template.jinja, and build again")),
    "completion-template": Flag(r.refuse("completions are continued as they are")),
    "tool-call-parser": Flag(r.PARSER),
    "reasoning-parser": Flag(r.refuse("reasoning is part of the text")),
    "grammar-backend": Flag(r.moot("grammars are llguidance's")),
    "tensor-parallel-size": Flag(_DEVICE),
    "pipeline-parallel-size": Flag(_DEVICE),
    "data-parallel-size": Flag(_ENGINE),
    "expert-parallel-size": Flag(_DEVICE),
    "nnodes": Flag(r.one("node")),
    "node-rank": Flag(r.only(("0",), "there is one node", "there is one node")),
    "dist-init-addr": Flag(r.moot("there is one node")),
    "enable-p2p-check": Flag(r.moot("a model has one device here"), 0),
    "device": Flag(
        r.only(("auto", "cpu"), "variants are picked for this host", "build for it with `llmbuild build -t TARGET`")
    ),
    "attention-backend": Flag(_BACKEND),
    "prefill-attention-backend": Flag(_BACKEND),
    "decode-attention-backend": Flag(_BACKEND),
    "sampling-backend": Flag(_BACKEND),
    "enable-torch-compile": Flag(r.NO_GRAPHS, 0),
    "torch-compile-max-bs": Flag(r.NO_GRAPHS),
    "disable-cuda-graph": Flag(r.NO_GRAPHS, 0),
    "disable-cuda-graph-padding": Flag(r.NO_GRAPHS, 0),
    "disable-overlap-schedule": Flag(r.moot("a step is scheduled when the one before has ended"), 0),
    "stream-interval": Flag(r.STREAM_INTERVAL),
    "stream-output": Flag(r.moot("chunks have what is new"), 0),
    "skip-server-warmup": Flag(r.moot("there is none"), 0),
    "warmups": Flag(r.moot("there is none")),
    "watchdog-timeout": Flag(r.moot("/ready tells of an engine that stands still")),
    "enable-metrics": Flag(r.moot("/metrics is always there"), 0),
    "log-level": Flag(r.NOT_LOGGED),
    "log-level-http": Flag(r.NOT_LOGGED),
    "log-requests": Flag(r.refuse("prompts and answers are in no log"), 0),
    "log-requests-level": Flag(r.NOT_LOGGED),
    "show-time-cost": Flag(r.moot("/metrics is always there"), 0),
    "decode-log-interval": Flag(r.NOT_LOGGED),
    "enable-cache-report": Flag(r.moot("usage always tells cached tokens"), 0),
    "enable-lora": Flag(r.NO_LORA, 0),
    "disaggregation-mode": Flag(r.only(("null",), "there is one process", "there is one process")),
    "speculative-algorithm": Flag(r.speculation),
    "speculative-draft-model-path": Flag(r.draft_path),
    "speculative-num-steps": Flag(r.draft_tokens),
    "speculative-eagle-topk": Flag(r.draft_tokens),
    "speculative-num-draft-tokens": Flag(r.draft_tokens),
    "enable-hierarchical-cache": Flag(r.refuse("caches are in memory alone"), 0),
}

PREFIXES: Mapping[str, Flag] = {
    "lora-": Flag(r.NO_LORA),
    "max-lora": Flag(r.NO_LORA),
    "max-loras": Flag(r.NO_LORA),
    "mm-": Flag(r.NO_MEDIA),
    "speculative-": Flag(r.NO_DRAFTS),
    "ssl-": Flag(r.NO_TLS),
    "cuda-graph-": Flag(r.NO_GRAPHS),
    "disaggregation-": Flag(r.refuse("there is one process")),
}

ALIASES = {
    "--model": "model-path",
    "--speculative-draft-model": "speculative-draft-model-path",
    "--tp": "tensor-parallel-size",
    "--tp-size": "tensor-parallel-size",
    "--pp-size": "pipeline-parallel-size",
    "--dp": "data-parallel-size",
    "--dp-size": "data-parallel-size",
    "--ep": "expert-parallel-size",
    "--ep-size": "expert-parallel-size",
    "--nccl-init-addr": "dist-init-addr",
}

VARIABLES: Mapping[str, Flag] = {
    "CUDA_VISIBLE_DEVICES": Flag(r.moot("variants are picked for this host")),
    "SGLANG_USE_CPU_ENGINE": Flag(r.moot("variants are picked for this host")),
    "HF_TOKEN": Flag(r.refuse("set it for `llmbuild build`")),
    "HF_HOME": Flag(r.refuse("set it for `llmbuild build`")),
}
