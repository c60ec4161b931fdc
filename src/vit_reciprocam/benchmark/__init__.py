"""Time and memory of explanations, as ratios to plain forward passes."""
