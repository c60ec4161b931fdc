"""Classifiers by name, and explanations of pictures by them."""
