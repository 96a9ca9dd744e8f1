"""Linear systems, eigenproblems and scores of ridge and kernel regression: arrays in, arrays out."""
