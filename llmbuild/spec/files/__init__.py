"""Strict readers of recipes and targets: all errors at once, each with its path and line."""
