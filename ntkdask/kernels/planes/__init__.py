"""Convolutional kernels on offset planes: general arrays, compiled loops on the CPU, CUDA on the GPU."""
