"""ntkdask: neural tangent kernels at any scale."""
