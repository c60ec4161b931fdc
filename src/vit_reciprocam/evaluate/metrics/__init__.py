"""The metrics and the protocols that name their settings."""
