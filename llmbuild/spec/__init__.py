"""Shared data types: frozen dataclasses on the standard library alone; only `files` reads files."""
