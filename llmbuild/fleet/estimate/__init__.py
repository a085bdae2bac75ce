"""Estimates: what a step of a model takes on a machine where it was never measured, and how observations refine it."""
