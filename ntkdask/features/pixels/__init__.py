"""Convolutional sketches: features of the pixels of images, taken through the layers of a network."""
