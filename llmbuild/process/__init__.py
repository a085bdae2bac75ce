"""Tools in child processes: started apart from the caller, limited, and why they failed."""
