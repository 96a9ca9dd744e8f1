"""Convolutional kernels on planes of equal offset: for any network on arrays, compiled for the CPU, and in CUDA for the GPU."""
