"""Per-example gradients of a module, the rows of its Jacobian, and their products."""
