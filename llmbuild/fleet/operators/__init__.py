"""Operators of a model as things to be placed: their profiles, cells of devices that hold them, plans and queues."""
