"""The knobs of the search space, what they are left out for, and what is known to break."""
