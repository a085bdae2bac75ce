"""Measuring elsewhere: variants packed into a folder here, and measured there."""
