"""Pictures: reading and preparing them, drawing maps on them, and drawing scenes."""
