"""Ridge regression on streamed features."""
