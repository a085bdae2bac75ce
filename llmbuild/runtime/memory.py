"""IREE drivers whose devices share memory with this process."""

from __future__ import annotations


def shares_memory(driver: str) -> bool:
    """Return whether a driver's device shares memory with this process, as a CPU does."""
    return driver.startswith("local-")
