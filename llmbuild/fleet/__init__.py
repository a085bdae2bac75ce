"""Machines that are not this one: what they would pick, and folders that are packed here and measured there."""
