"""Metrics for Prometheus, by vLLM's names where the meaning is the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from llmbuild.serve.observe import Lived, Observer, Snapshot, Turned
from llmbuild.serve.request import SamplingParams

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABELS = ["model_name", "engine"]
_ENGINE = "0"
_SECONDS = tuple(step * 10.0**power for power in range(-5, 3) for step in (1, 2.5, 5))
"""From 10 µs on: a small model makes a token in less than a millisecond."""
_LATE = 256
"""Turns and gaps that are counted together: between two steps, whose weights have taken the place of all else in the
caches, counting each takes longer by far.
"""
_TOKENS = tuple(2.0**n for n in range(18))


class Metrics:
    """The metrics of a server: a registry of its own, and an observer for each model."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._observers: list[ModelMetrics] = []

        def counter(name: str, meaning: str, *more: str) -> Counter:
            return Counter(f"vllm:{name}", meaning, [*_LABELS, *more], registry=self._registry)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"vllm:{name}", meaning, _LABELS, registry=self._registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were computed.")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated.")
        self.queries = counter("prefix_cache_queries", "Tokens of prompts that were looked for among computed ones.")
        self.hits = counter("prefix_cache_hits", "Tokens of prompts that were found among computed ones.")
        self.drafts = counter("spec_decode_num_draft_tokens", "Tokens that were guessed and computed.")
        self.right = counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right.")
        self.success = counter("request_success", "Sequences that ended, by their finish reason.", "finished_reason")
        self.preemptions = counter("num_preemptions", "Sequences that lost their place, and were computed again.")
        self.iteration = histogram("iteration_tokens_total", "Tokens that a step computed.", _TOKENS)
        self.first = histogram("time_to_first_token_seconds", "From the arrival to the first token.")
        self.gap = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.")
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean of a sequence, after its first token."
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From the arrival to the end.")
        self.queue = histogram("request_queue_time_seconds", "From the arrival to the admission.")
        self.inference = histogram("request_inference_time_seconds", "From the admission to the end.")
        self.prefill = histogram("request_prefill_time_seconds", "From the admission to the first token.")
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.")
        self.request_prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.request_generation = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.params_n = histogram("request_params_n", "Answers that a request asks for.", _TOKENS)
        self.max_tokens = histogram("request_params_max_tokens", "Most tokens that a request asks for.", _TOKENS)
        self.step = Histogram(
            "llmbuild:step_seconds", "Of the device in a step.", _LABELS, registry=self._registry, buckets=_SECONDS
        )
        self.draft = Histogram(
            "llmbuild:draft_seconds", "Of a drafter in a turn.", _LABELS, registry=self._registry, buckets=_SECONDS
        )
        self.host = Histogram(
            "llmbuild:host_seconds", "Of a turn, beside steps.", _LABELS, registry=self._registry, buckets=_SECONDS
        )

    def observe(self, model: str) -> ModelMetrics:
        """Return the observer of a model."""
        self._observers.append(ModelMetrics(self, model))
        return self._observers[-1]

    def watch(self, engines: Mapping[str, Callable[[], Snapshot]]) -> None:
        """Tell the state of engines with each reading."""
        self._registry.register(_States(engines))

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        for one in self._observers:
            one.count()
        return generate_latest(self._registry)


class ModelMetrics(Observer):
    """Counts what the engine of one model tells."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._all = (model, _ENGINE)
        self._late: deque[Turned | float] = deque()
        """Turns, and seconds between tokens, that are not counted yet. Threads only add and take single ones."""
        self._success = metrics.success

        def one(of: Histogram) -> Callable[[float], None]:
            return of.labels(*self._all).observe

        self._prompt_tokens = metrics.prompt_tokens.labels(*self._all)
        self._generation_tokens = metrics.generation_tokens.labels(*self._all)
        self._preemptions = metrics.preemptions.labels(*self._all)
        self._drafts, self._right = metrics.drafts.labels(*self._all), metrics.right.labels(*self._all)
        self._queries, self._hits = metrics.queries.labels(*self._all), metrics.hits.labels(*self._all)
        self._iteration, self._step, self._host = one(metrics.iteration), one(metrics.step), one(metrics.host)
        self._draft = one(metrics.draft)
        self._first, self._gap, self._per_token = one(metrics.first), one(metrics.gap), one(metrics.per_token)
        self._e2e, self._queue, self._inference = one(metrics.e2e), one(metrics.queue), one(metrics.inference)
        self._prefill, self._decode = one(metrics.prefill), one(metrics.decode)
        self._request_prompt, self._request_generation = one(metrics.request_prompt), one(metrics.request_generation)
        self._params_n, self._max_tokens = one(metrics.params_n), one(metrics.max_tokens)

    def asked(self, params: SamplingParams) -> None:
        """Count what a request asks for."""
        self._params_n(params.n)
        if params.max_tokens is not None:
            self._max_tokens(params.max_tokens)

    def admitted(self, prompt_tokens: int, cached: int) -> None:
        self._queries.inc(prompt_tokens)
        self._hits.inc(cached)

    def preempted(self) -> None:
        self._preemptions.inc()

    def turned(self, turn: Turned) -> None:
        self._add(turn)

    def gap(self, seconds: float) -> None:
        self._add(seconds)

    def _add(self, what: Turned | float) -> None:
        self._late.append(what)
        if len(self._late) >= _LATE:
            self.count()

    def count(self) -> None:
        """Count what has come, in any thread."""
        turns = list[Turned]()
        while self._late:
            try:
                one = self._late.popleft()
            except IndexError:  # another thread was faster
                break
            if isinstance(one, Turned):
                turns.append(one)
            else:
                self._gap(one)
        self._prompt_tokens.inc(sum(turn.prompt_tokens for turn in turns))
        self._generation_tokens.inc(sum(turn.tokens for turn in turns))
        self._drafts.inc(sum(turn.drafts for turn in turns))
        self._right.inc(sum(turn.right for turn in turns))
        for turn in turns:
            self._iteration(turn.computed)
            self._step(turn.step_s)
            self._host(turn.turn_s - turn.step_s - turn.draft_s)
            if turn.draft_s:
                self._draft(turn.draft_s)

    def first(self, seconds: float) -> None:
        self._first(seconds)

    def lived(self, sequence: Lived) -> None:
        one = sequence
        self._success.labels(*self._all, one.reason).inc()
        self._e2e(one.ended_s - one.arrival_s)
        self._request_prompt(one.prompt_tokens)
        self._request_generation(one.tokens)
        if one.admitted_s is None:
            return
        self._queue(one.admitted_s - one.arrival_s)
        self._inference(one.ended_s - one.admitted_s)
        if one.first_s is None or one.last_s is None:
            return
        self._prefill(one.first_s - one.admitted_s)
        self._decode(one.last_s - one.first_s)
        if one.tokens > 1:
            self._per_token((one.last_s - one.first_s) / (one.tokens - 1))


class _States(Collector):
    """Reads the state of engines when it is asked."""

    def __init__(self, engines: Mapping[str, Callable[[], Snapshot]]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        gauges: dict[str, tuple[str, Callable[[Snapshot], float]]] = {
            "vllm:num_requests_running": ("Sequences with a slot.", lambda s: s.running),
            "vllm:num_requests_waiting": ("Sequences in the queue.", lambda s: s.waiting),
            "vllm:kv_cache_usage_perc": (
                "Part of the KV cache that is reserved; or taken, with expected admission.",
                lambda s: s.used,
            ),
            "llmbuild:slots": ("Sequences that can run at a time.", lambda s: s.slots),
            "llmbuild:seconds_without_step": ("Since the last step, while there is work.", lambda s: s.idle_s),
        }
        states = {model: read() for model, read in self._engines.items()}
        for name, (meaning, value) in gauges.items():
            family = Metric(name, meaning, "gauge")
            for model, state in states.items():
                family.samples.append(Sample(name, {"model_name": model, "engine": _ENGINE}, value(state)))
            yield family
