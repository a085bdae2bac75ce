"""A fleet on Ray: agents that run servers on its nodes, and the backend that places them."""
