"""The knobs of the search space, the values left out of it, and known compiler failures."""
