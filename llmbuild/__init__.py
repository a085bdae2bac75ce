"""`make` for LLM binaries: `load` opens the variant of a catalog that meets a service-level objective on this host."""

TYPE_CHECKING = False
if TYPE_CHECKING:  # `python -m llmbuild` reads this file while modules are still looked for in the caller's folder
    from llmbuild.runtime.model import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    """Import the loader when it is first asked for, so that `import llmbuild` costs nothing."""
    if name == "load":
        from llmbuild.runtime.model import load

        return load
    raise AttributeError(f"module 'llmbuild' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name the loader too, which is not imported yet."""
    return sorted({*globals(), *__all__})
