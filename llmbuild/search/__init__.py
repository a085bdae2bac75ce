"""What to try next and what came out best; the one home of optuna. May not import other stages."""
