"""The method: masks, the split of a model, and the two ways from a split to scores."""
