"""The parts of peers.py: the peers' environment, interleaved rounds over worker processes, and the table."""
