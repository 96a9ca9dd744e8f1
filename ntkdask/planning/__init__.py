"""Pure integers and seconds: what fits, and how long it takes."""
