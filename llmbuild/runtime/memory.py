"""Which IREE drivers' devices see the memory of this process."""

from __future__ import annotations


def shares_memory(driver: str) -> bool:
    """Say whether a driver's device and this process see the same memory, as a CPU's do."""
    return driver.startswith("local-")
