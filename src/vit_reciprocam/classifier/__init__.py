"""From a name to a classifier, and from a picture to its explanation."""
