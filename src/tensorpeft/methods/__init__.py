"""One small file per method, readable as its paper's method section."""
