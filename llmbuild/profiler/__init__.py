"""Measure an artifact in a process of its own, through the very runtime that users load it with."""
