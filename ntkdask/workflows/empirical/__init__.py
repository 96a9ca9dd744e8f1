"""What empirical kernels are for: training, linearised prediction, comparisons, the sweep of the paper."""
