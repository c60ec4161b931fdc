"""Everything known of each model library: a folder per library."""
