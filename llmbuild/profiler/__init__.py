"""Measure an artifact in its own process, with the same runtime that users load it with."""
