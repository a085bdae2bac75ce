"""Fleets: which variant of which model runs where, how many, at which setting; planned, and simulated over a trace."""
