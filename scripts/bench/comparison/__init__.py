"""What peers.py is made of: the peers' environment, interleaved rounds over worker processes, and the table."""
