"""What lies between us and the system: child processes and why they fail, limits, the terminal, JSON texts."""
