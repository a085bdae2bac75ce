"""Answer prompts by llmbuild's loader alone, in one process: what the server's cost is measured against."""

from __future__ import annotations

from time import perf_counter

from peer_worker import Request, serve

import llmbuild


class Loader:
    """The loader with one variant, opened by the first request."""

    def open(self, request: Request) -> Request:
        """Open {variant} of {model} in {catalog}."""
        self._model = llmbuild.load(request["catalog"], request["model"], variant=request["variant"])
        return {"context": self._model.session.abi.context}

    def answer(self, request: Request) -> Request:
        """Answer {prompt} with up to {count} tokens; return their count, text and seconds per token after the first."""
        times, text = list[float](), ""
        decoder = self._model.tokenizer.decoder(request["prompt"])
        for token in self._model.tokens(request["prompt"], request["count"]):
            text += decoder.push(token)
            times.append(perf_counter())
        spent = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        return {"output_tokens": len(times), "tpot_s": spent, "text": text + decoder.end()}


if __name__ == "__main__":
    loader = Loader()
    serve({"open": loader.open, "answer": loader.answer})
