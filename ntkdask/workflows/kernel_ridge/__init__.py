"""Kernel ridge regression on a kernel matrix in tiles."""
