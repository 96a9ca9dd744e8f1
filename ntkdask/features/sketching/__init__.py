"""The linear sketches and polynomial fits that feature maps are made of."""
