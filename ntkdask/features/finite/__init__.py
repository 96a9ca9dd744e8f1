"""Finite random networks as feature maps use them: forward passes, and the gradient of the output for each row."""
