"""Catalogs between places: publish, pull, sign, merge, compare; folders, object stores and OCI registries."""
