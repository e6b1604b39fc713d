"""Data sets and their metrics: one file per task."""
