"""MLIR text of our own kernels, one module per instruction set. Pure Python: no torch, no compiler."""
