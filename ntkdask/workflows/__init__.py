"""Workflows: each reads like the paper's algorithm box, over maps and reductions of tiles."""
