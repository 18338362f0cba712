"""From a model to a captured graph in the dialect that passes read."""
