"""Everything a person or a script reads: tables, progress, JSON and CSV. Knows the terminal, builds nothing."""
