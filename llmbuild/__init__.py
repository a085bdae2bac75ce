"""`make` for LLM binaries: `load` opens the variant of a catalog that meets a service-level objective on this host."""

TYPE_CHECKING = False
if TYPE_CHECKING:  # `python -m llmbuild` reads this file while the caller's folder is still on the module path
    from llmbuild.runtime.model import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    """Import the loader on first use, so that `import llmbuild` is cheap."""
    if name == "load":
        from llmbuild.runtime.model import load

        return load
    raise AttributeError(f"module 'llmbuild' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the loader too, which is not imported yet."""
    return sorted({*globals(), *__all__})
