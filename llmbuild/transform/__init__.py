"""Model-level choices as pure data work: how weights are quantized and laid out. NumPy only."""
