"""Tools in child processes: isolated, with limits and a diagnosis of failures."""
