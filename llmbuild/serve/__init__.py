"""Serving: an engine that answers many requests with one variant, schedulers, the HTTP API, and the offline class.

Stands on `runtime` and `spec` alone. What is named here is imported on first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from llmbuild.serve.offline import LLM, CompletionOutput, RequestOutput
    from llmbuild.serve.request import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> object:
    """Import what is named on first use, so that `import llmbuild.serve` is cheap."""
    if name not in __all__:
        raise AttributeError(f"module 'llmbuild.serve' has no attribute {name!r}")
    if name == "SamplingParams":
        from llmbuild.serve.request import SamplingParams

        return SamplingParams
    from llmbuild.serve import offline

    return getattr(offline, name)


def __dir__() -> list[str]:
    """List what is not imported yet, too."""
    return sorted({*globals(), *__all__})
