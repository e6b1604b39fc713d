"""What several methods share, or one has beside its network; no method itself."""
