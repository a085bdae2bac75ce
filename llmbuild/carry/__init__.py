"""Measurement on offline machines: variants are packed into a folder here, and measured there."""
