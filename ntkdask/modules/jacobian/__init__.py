"""Per-example gradients of a module, the rows of its Jacobian, and their products.

How they are computed, from the bottom: `twins` (the private copy), `capture` (one pass), `contributions` and `rules` (a layer's
part in a gradient), `fallback` (any other parameter), `probe`, `dry_run` and `survey` (what a module is like), `blocks` and
`gradients` (what passes keep), `products` and `tangent` (kernels), `slices` (features).
"""
