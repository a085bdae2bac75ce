"""Profiles: what a variant does on a device, from published rows, from a catalog, or as the fleet file gives it."""
