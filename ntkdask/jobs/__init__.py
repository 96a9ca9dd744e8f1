"""Jobs: from a TOML file to metrics.json in a run folder."""
