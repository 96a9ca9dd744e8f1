"""Kernel matrices out of core, planned, built in tiles, or lazy."""

from ntkdask.workflows.kernel_matrix.build import kernel_matrix, open_matrix, plan_kernel_matrix

__all__ = ["kernel_matrix", "open_matrix", "plan_kernel_matrix"]
