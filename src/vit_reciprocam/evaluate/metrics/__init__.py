"""Metrics as pure functions, the registry of them, and protocols that name their settings."""
