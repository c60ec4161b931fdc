"""Results: the explanation of a batch, and how it is written to a folder."""
