"""Schedulers: pure functions from the engine's state to the next batch; they need no device and no library."""
