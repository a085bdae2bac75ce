"""All output for people and scripts: tables, progress, JSON and CSV. It formats for the terminal and builds nothing."""
