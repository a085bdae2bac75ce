"""Strict readers of recipes, targets and fleets: all errors at once, each with its path and line."""
