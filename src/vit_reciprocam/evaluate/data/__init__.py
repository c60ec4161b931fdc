"""Data sets: layouts on disk, their labels, and drawn scenes."""
