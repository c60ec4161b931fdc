"""Pictures: reading and preparing them, drawing maps on them, and drawn scenes."""
