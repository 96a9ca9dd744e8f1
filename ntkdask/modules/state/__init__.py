"""What a module is: its structure and weights, in files, in messages and in fingerprints."""
