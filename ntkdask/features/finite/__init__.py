"""Finite random networks as feature maps read them: forward passes and gradients for each row."""
