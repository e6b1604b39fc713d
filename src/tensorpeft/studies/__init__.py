"""What a person runs to decide: comparisons and measurements on the public API."""
