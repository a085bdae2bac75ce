"""Interfaces to the system: resource limits, paths, optional libraries, the terminal, JSON texts."""
