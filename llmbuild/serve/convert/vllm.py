"""The flags of vLLM's server."""

from __future__ import annotations

from collections.abc import Mapping

from llmbuild.serve.convert import rules as r
from llmbuild.serve.convert.rules import Flag

FLAGS: Mapping[str, Flag] = {
    "model": Flag(r.model),
    "served-model-name": Flag(r.name, -1),
    "max-model-len": Flag(r.context),
    "dtype": Flag(r.DTYPE),
    "quantization": Flag(r.QUANTIZATION),
    "kv-cache-dtype": Flag(r.KV_DTYPE),
    "load-format": Flag(r.load_format),
    "host": Flag(r.serve("--host")),
    "port": Flag(r.serve("--port")),
    "api-key": Flag(r.keys, -1),
    "max-num-seqs": Flag(r.count("--max-sequences", 1, 1024)),
    "gpu-memory-utilization": Flag(r.share),
    "shutdown-timeout": Flag(r.serve("--shutdown-timeout")),
    "enable-chunked-prefill": Flag(r.chunked, 0),
    "no-enable-chunked-prefill": Flag(r.whole_prompts, 0),
    "scheduling-policy": Flag(
        r.only(("fcfs", "priority"), "priorities hold under every scheduler", "there is no such policy")
    ),
    "max-num-batched-tokens": Flag(r.refuse("how many tokens a step has is the scheduler's to say")),
    "max-num-partial-prefills": Flag(r.refuse("how many prompts a step has is the scheduler's to say")),
    "long-prefill-token-threshold": Flag(r.refuse("how long pieces of prompts are is the scheduler's to say")),
    "enable-prefix-caching": Flag(r.moot("prompts that begin alike always share blocks"), 0),
    "no-enable-prefix-caching": Flag(r.refuse("prompts that begin alike always share blocks"), 0),
    "prefix-caching-hash-algo": Flag(r.moot("blocks are named by SHA-256")),
    "block-size": Flag(r.moot("blocks have 32 positions")),
    "swap-space": Flag(r.moot("nothing is swapped out: what loses its place is computed again")),
    "cpu-offload-gb": Flag(r.moot("weights are mapped from the disk into memory")),
    "kv-cache-memory-bytes": Flag(
        r.refuse("llmbuild serve --memory bounds weights and caches together: give their sum")
    ),
    "num-gpu-blocks-override": Flag(r.refuse("llmbuild serve --memory bounds the blocks")),
    "enforce-eager": Flag(r.NO_GRAPHS, 0),
    "no-enforce-eager": Flag(r.NO_GRAPHS, 0),
    "max-seq-len-to-capture": Flag(r.NO_GRAPHS),
    "compilation-config": Flag(r.NO_GRAPHS),
    "async-scheduling": Flag(r.moot("a step is scheduled when the one before has ended"), 0),
    "stream-interval": Flag(r.STREAM_INTERVAL),
    "seed": Flag(r.moot("a request has its own seed")),
    "task": Flag(r.only(("auto", "generate"), "models generate", "models generate text alone")),
    "runner": Flag(r.only(("auto", "generate"), "models generate", "models generate text alone")),
    "convert": Flag(r.only(("auto", "none"), "models generate", "models generate text alone")),
    "tokenizer": Flag(r.refuse("the tokenizer is the model's own: put it into its folder")),
    "tokenizer-mode": Flag(r.only(("auto", "fast"), "the tokenizer is the fast one", "there is the fast one alone")),
    "skip-tokenizer-init": Flag(r.refuse("the API needs the tokenizer"), 0),
    "revision": Flag(r.refuse("name a folder with the files of that revision")),
    "code-revision": Flag(r.NO_CODE),
    "tokenizer-revision": Flag(r.refuse("name a folder with the files of that revision")),
    "trust-remote-code": Flag(r.NO_CODE, 0),
    "no-trust-remote-code": Flag(r.moot("code of a model is never run"), 0),
    "download-dir": Flag(r.refuse("set HF_HOME for `llmbuild build`")),
    "hf-token": Flag(r.refuse("set HF_TOKEN for `llmbuild build`")),
    "hf-overrides": Flag(r.refuse("change config.json in the model's folder")),
    "model-impl": Flag(r.only(("auto",), "there is one", "there is one")),
    "config-format": Flag(r.only(("auto", "hf"), "it is Hugging Face's", "it is Hugging Face's alone")),
    "generation-config": Flag(
        r.only(("vllm",), "requests without parameters have vLLM's defaults", "defaults of a model are not read")
    ),
    "override-generation-config": Flag(r.refuse("give the parameters with each request")),
    "max-logprobs": Flag(r.moot("a request has up to 20")),
    "logprobs-mode": Flag(
        r.only(("raw_logprobs",), "they are the model's own", "they are the model's own distribution's")
    ),
    "logits-processors": Flag(r.refuse("code of others is not run"), -1),
    "chat-template": Flag(r.refuse("put it into the model's folder as chat_template.jinja, and build again")),
    "chat-template-content-format": Flag(r.only(("auto", "string"), "contents are texts", "contents are texts")),
    "response-role": Flag(r.only(("assistant",), "it is assistant", "it is assistant")),
    "enable-auto-tool-choice": Flag(r.moot("tools are taken where the chat template takes them"), 0),
    "tool-call-parser": Flag(r.PARSER),
    "tool-parser-plugin": Flag(r.refuse("code of others is not run")),
    "reasoning-parser": Flag(r.refuse("reasoning is part of the text")),
    "guided-decoding-backend": Flag(r.moot("grammars are llguidance's")),
    "structured-outputs-config": Flag(r.moot("grammars are llguidance's")),
    "tensor-parallel-size": Flag(r.one("device")),
    "pipeline-parallel-size": Flag(r.one("device")),
    "data-parallel-size": Flag(r.one("engine")),
    "decode-context-parallel-size": Flag(r.one("device")),
    "enable-expert-parallel": Flag(r.refuse("a model has one device here"), 0),
    "api-server-count": Flag(r.one("server")),
    "distributed-executor-backend": Flag(r.moot("a model has one device here")),
    "disable-custom-all-reduce": Flag(r.moot("a model has one device here"), 0),
    "device": Flag(
        r.only(("auto", "cpu"), "variants are picked for this host", "build for it with `llmbuild build -t TARGET`")
    ),
    "enable-lora": Flag(r.NO_LORA, 0),
    "no-enable-lora": Flag(r.moot("there are no adapters"), 0),
    "limit-mm-per-prompt": Flag(r.NO_MEDIA),
    "allowed-local-media-path": Flag(r.NO_MEDIA),
    "disable-log-requests": Flag(r.NOT_LOGGED, 0),
    "no-enable-log-requests": Flag(r.NOT_LOGGED, 0),
    "enable-log-requests": Flag(r.refuse("prompts and answers are in no log"), 0),
    "max-log-len": Flag(r.NOT_LOGGED),
    "disable-log-stats": Flag(r.moot("/metrics is always there"), 0),
    "uvicorn-log-level": Flag(r.NOT_LOGGED),
    "disable-uvicorn-access-log": Flag(r.refuse("each request is a line of the log"), 0),
    "disable-frontend-multiprocessing": Flag(r.moot("there is one process"), 0),
    "root-path": Flag(r.refuse("paths begin at /: let a proxy change them")),
    "allowed-origins": Flag(r.refuse("there is no CORS: let a proxy answer it"), -1),
    "allowed-methods": Flag(r.refuse("there is no CORS: let a proxy answer it"), -1),
    "allowed-headers": Flag(r.refuse("there is no CORS: let a proxy answer it"), -1),
    "allow-credentials": Flag(r.refuse("there is no CORS: let a proxy answer it"), 0),
    "middleware": Flag(r.refuse("code of others is not run")),
    "otlp-traces-endpoint": Flag(r.refuse("there are no traces: /metrics has the times")),
    "kv-transfer-config": Flag(r.refuse("caches are in one process")),
    "speculative-config": Flag(r.speculation),
    "enable-sleep-mode": Flag(r.refuse("a server that is not needed is ended"), 0),
}

PREFIXES: Mapping[str, Flag] = {
    "lora-": Flag(r.NO_LORA),
    "max-lora": Flag(r.NO_LORA),
    "max-cpu-loras": Flag(r.NO_LORA),
    "mm-": Flag(r.NO_MEDIA),
    "speculative-": Flag(r.NO_DRAFTS),
    "num-speculative-tokens": Flag(r.NO_DRAFTS),
    "ssl-": Flag(r.NO_TLS),
    "data-parallel-": Flag(r.refuse("a model has one engine here")),
    "ray-": Flag(r.moot("a model has one device here"), 0),
    "cudagraph-": Flag(r.NO_GRAPHS),
}

ALIASES = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-q": "quantization",
    "-O": "compilation-config",
    "-cc": "compilation-config",
    **{f"-O{level}": "enforce-eager" for level in range(4)},
}

VARIABLES: Mapping[str, Flag] = {
    "VLLM_API_KEY": Flag(r.keys),
    "VLLM_CPU_KVCACHE_SPACE": FLAGS["kv-cache-memory-bytes"],
    "VLLM_CPU_OMP_THREADS_BIND": Flag(r.moot("workers are pinned, each to its own core")),
    "CUDA_VISIBLE_DEVICES": Flag(r.moot("variants are picked for this host")),
    "HF_TOKEN": Flag(r.refuse("set it for `llmbuild build`")),
    "HF_HOME": Flag(r.refuse("set it for `llmbuild build`")),
    "VLLM_LOGGING_LEVEL": Flag(r.NOT_LOGGED),
}
