"""The strict readers of recipes and targets: every error at once, with its path and line."""
