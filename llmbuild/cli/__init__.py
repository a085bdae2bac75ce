"""The commands: click's groups, their options, and the only place where an error becomes an exit code."""
