"""GPU kernels of the ops, one file per op and language."""
