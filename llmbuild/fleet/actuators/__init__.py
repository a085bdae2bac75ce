"""What changes a real fleet: the actions and their answers, the local backend, and the journal of what runs."""
