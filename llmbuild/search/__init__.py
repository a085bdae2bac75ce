"""What to try next, and which results are best; only this package imports optuna. It may not import other stages."""
