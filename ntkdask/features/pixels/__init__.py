"""Features of pixels: what sketches of convolutional networks share."""
