"""Energy meters: RAPL, NVML, an estimate, and their selection for a device."""
