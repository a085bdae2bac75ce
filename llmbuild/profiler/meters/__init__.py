"""Meters of energy: RAPL, NVML, an estimate, and which of them a device has."""
