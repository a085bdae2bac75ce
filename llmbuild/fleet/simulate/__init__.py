"""A fleet under a trace, simulated step by step with the schedulers of the server behind a simulated clock."""
