"""Exchange of catalogs: publish, pull, sign, merge, compare; folders, object stores and OCI registries."""
